//! The answer to a DHCP question (RFC 2131) of a machine. No I/O. What is said is what the machine has
//! for life, so that every host says the same, and a lease is renewed wherever the machine is by then.
//!
//! What must hold: the question's bytes are a guest's, and nothing in them is believed but what it asks.

use super::Offer;
use crate::{datapath::MachineNet, tap::GATEWAY};
use dhcproto::{
    Encodable,
    v4::{DhcpOption, Flags, Message, MessageType, Opcode, OptionCode, borrowed},
};
use std::net::Ipv4Addr;

/// Seconds that a guest may keep its address without asking again. It is its own for life; this bounds
/// how long it uses settings (names) of an older agent.
const LEASE_S: u32 = 12 * 3600;
/// Shorter answers are filled up: clients of BOOTP's time drop them (RFC 1542, 2.1).
const SHORTEST: usize = 300;
/// Longest identifier that is sent back; those of clients have up to about 130 bytes (RFC 4361).
const LONGEST_ID: usize = 255;

/// What is read of a question, and nothing else: the library's own reading of all options asserts what it
/// should refuse.
struct Asked {
    kind: MessageType,
    number: u32,
    flags: Flags,
    /// The address that the guest has and uses.
    has: Option<Ipv4Addr>,
    /// The address that it asks for.
    wanted: Option<Ipv4Addr>,
    /// Whose offer it took.
    server: Option<Ipv4Addr>,
    /// What comes back to it as it is.
    id: Option<Vec<u8>>,
}

impl Asked {
    /// `None` if this is no question of the machine with this MAC.
    fn read(bytes: &[u8], mac: [u8; 6]) -> Option<Self> {
        let message = borrowed::Message::new(bytes).ok()?;
        // The length first: the library takes any, and its address is 16 bytes long.
        let own = message.hlen() == 6 && message.chaddr() == mac;
        let direct = message.giaddr().is_unspecified();
        if !own || !direct || message.opcode() != Opcode::BootRequest {
            return None;
        }
        let has = Some(message.ciaddr()).filter(|a| !a.is_unspecified());
        let (number, flags) = (message.xid(), message.flags());
        let (mut kind, mut wanted, mut server, mut id) = (None, None, None, None);
        for option in message.opts() {
            let data = option.data();
            let address = || <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
            match option.code() {
                OptionCode::MessageType => kind = data.first().map(|&k| MessageType::from(k)),
                OptionCode::RequestedIpAddress => wanted = address(),
                // One that makes no sense is not this one.
                OptionCode::ServerIdentifier => {
                    server = Some(address().unwrap_or(Ipv4Addr::UNSPECIFIED));
                }
                OptionCode::ClientIdentifier if data.len() <= LONGEST_ID => {
                    id = Some(data.to_vec());
                }
                _ => {}
            }
        }
        Some(Self { kind: kind?, number, flags, has, wanted, server, id })
    }
}

/// The answer to a machine's question, and where it goes; `None` if there is nothing to say.
pub(crate) fn answer(
    question: &[u8],
    net: &MachineNet,
    offer: &Offer,
) -> Option<(Vec<u8>, Ipv4Addr)> {
    let question = Asked::read(question, net.mac)?;
    // Somebody else's offer was taken.
    if question.server.is_some_and(|server| server != GATEWAY) {
        return None;
    }
    let wanted = question.wanted.or(question.has);
    let kind = match question.kind {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request if wanted == Some(net.address) => MessageType::Ack,
        MessageType::Request if wanted.is_some() => MessageType::Nak,
        MessageType::Inform if question.has == Some(net.address) => MessageType::Ack,
        MessageType::Decline => {
            tracing::warn!(machine = net.machine, address = %net.address,
                "the guest says that somebody else has its address");
            return None;
        }
        // A release changes nothing: the address stays the machine's.
        _ => return None,
    };
    let mut answer = Message::default();
    answer
        .set_opcode(Opcode::BootReply)
        .set_xid(question.number)
        .set_flags(question.flags)
        .set_chaddr(&net.mac);
    if let Some(id) = question.id {
        // RFC 6842.
        answer.opts_mut().insert(DhcpOption::ClientIdentifier(id));
    }
    answer.opts_mut().insert(DhcpOption::MessageType(kind));
    answer.opts_mut().insert(DhcpOption::ServerIdentifier(GATEWAY));
    if kind == MessageType::Ack {
        answer.set_ciaddr(question.has.unwrap_or(Ipv4Addr::UNSPECIFIED));
    }
    if kind != MessageType::Nak {
        settings(net, offer, &mut answer);
        if question.kind != MessageType::Inform {
            answer.set_yiaddr(net.address);
            answer.opts_mut().insert(DhcpOption::AddressLeaseTime(LEASE_S));
        }
    }
    // Who has the address hears it there; who does not, hears what goes to all.
    let has_it = question.has == Some(net.address) && kind == MessageType::Ack;
    let to = if has_it { net.address } else { Ipv4Addr::BROADCAST };
    let mut bytes = answer.to_vec().ok()?;
    bytes.resize(bytes.len().max(SHORTEST), 0);
    Some((bytes, to))
}

fn settings(net: &MachineNet, offer: &Offer, answer: &mut Message) {
    let options = answer.opts_mut();
    options.insert(DhcpOption::SubnetMask(Ipv4Addr::BROADCAST));
    options.insert(DhcpOption::InterfaceMtu(net.mtu));
    options.insert(DhcpOption::Router(vec![GATEWAY]));
    // The gateway is outside the machine's network of one: it is said to be on the link (RFC 3442).
    let on_link = Ipv4Addr::UNSPECIFIED;
    let routes = [("169.254.1.1/32", on_link), ("0.0.0.0/0", GATEWAY)];
    let routes = routes.iter().filter_map(|(to, by)| Some((to.parse().ok()?, *by))).collect();
    options.insert(DhcpOption::ClasslessStaticRoute(routes));
    if let Some(name) = super::label(&net.machine) {
        options.insert(DhcpOption::Hostname(name));
    }
    if offer.names {
        options.insert(DhcpOption::DomainNameServer(vec![GATEWAY]));
    }
    if let Some(domain) = &offer.domain {
        options.insert(DhcpOption::DomainName(domain.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dhcproto::Decodable;
    use proptest::prelude::*;

    const OWN: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];

    fn net() -> MachineNet {
        MachineNet::new("Redis", OWN, MAC, 1380)
    }

    fn question(kind: MessageType, wanted: Option<Ipv4Addr>) -> Message {
        let mut question = Message::default();
        question.set_opcode(Opcode::BootRequest).set_chaddr(&MAC).set_xid(7);
        question.opts_mut().insert(DhcpOption::MessageType(kind));
        if let Some(wanted) = wanted {
            question.opts_mut().insert(DhcpOption::RequestedIpAddress(wanted));
        }
        question
    }

    fn ask(question: &Message) -> Option<(Message, Ipv4Addr)> {
        let offer = Offer { names: true, domain: Some("machine.internal".into()) };
        let (bytes, to) = answer(&question.to_vec().unwrap(), &net(), &offer)?;
        assert!(bytes.len() >= SHORTEST);
        Some((Message::from_bytes(&bytes).unwrap(), to))
    }

    #[test]
    fn a_machine_is_offered_and_given_its_own_address_with_all_that_it_needs() {
        for (kind, expected) in
            [(MessageType::Discover, MessageType::Offer), (MessageType::Request, MessageType::Ack)]
        {
            let mut asked = question(kind, Some(OWN));
            let id = DhcpOption::ClientIdentifier(vec![255, 1, 2, 3]);
            asked.opts_mut().insert(id.clone());
            let (said, to) = ask(&asked).unwrap();
            assert_eq!((said.xid(), said.yiaddr(), to), (7, OWN, Ipv4Addr::BROADCAST));
            assert!(said.opts().has_msg_type(expected));
            let routes = [("169.254.1.1/32", Ipv4Addr::UNSPECIFIED), ("0.0.0.0/0", GATEWAY)];
            let routes = routes.map(|(to, by)| (to.parse().unwrap(), by)).to_vec();
            for option in [
                id,
                DhcpOption::ServerIdentifier(GATEWAY),
                DhcpOption::AddressLeaseTime(LEASE_S),
                DhcpOption::SubnetMask(Ipv4Addr::BROADCAST),
                DhcpOption::InterfaceMtu(1380),
                DhcpOption::Router(vec![GATEWAY]),
                DhcpOption::ClasslessStaticRoute(routes),
                DhcpOption::Hostname("redis".into()),
                DhcpOption::DomainNameServer(vec![GATEWAY]),
                DhcpOption::DomainName("machine.internal".into()),
            ] {
                let code = OptionCode::from(&option);
                assert_eq!(said.opts().get(code), Some(&option));
            }
        }
    }

    #[test]
    fn a_renewal_is_answered_to_the_address_and_without_an_offer() {
        let mut asked = question(MessageType::Request, None);
        asked.set_ciaddr(OWN);
        let (said, to) = ask(&asked).unwrap();
        assert!(said.opts().has_msg_type(MessageType::Ack));
        assert_eq!((said.yiaddr(), said.ciaddr(), to), (OWN, OWN, OWN));
        let mut asked = question(MessageType::Inform, None);
        asked.set_ciaddr(OWN);
        let (said, to) = ask(&asked).unwrap();
        assert_eq!((said.yiaddr(), to), (Ipv4Addr::UNSPECIFIED, OWN));
        assert_eq!(said.opts().get(OptionCode::AddressLeaseTime), None);
    }

    #[test]
    fn another_address_is_refused() {
        let other = Ipv4Addr::new(10, 77, 0, 6);
        let (said, to) = ask(&question(MessageType::Request, Some(other))).unwrap();
        assert!(said.opts().has_msg_type(MessageType::Nak));
        assert_eq!((said.yiaddr(), to), (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
        assert_eq!(said.opts().get(OptionCode::Router), None);
    }

    #[test]
    fn what_is_not_a_question_of_the_machine_is_not_answered() {
        for kind in [MessageType::Release, MessageType::Decline, MessageType::Offer] {
            assert!(ask(&question(kind, Some(OWN))).is_none(), "{kind:?}");
        }
        assert!(ask(&question(MessageType::Request, None)).is_none(), "nothing is asked for");
        let change: [fn(&mut Message); 5] = [
            |m| {
                m.set_chaddr(&[2, 0, 0, 0, 0, 6]);
            },
            |m| {
                m.set_chaddr(&[2, 0, 0, 0, 0, 5, 0]);
            },
            |m| {
                m.set_opcode(Opcode::BootReply);
            },
            |m| {
                m.set_giaddr([10, 0, 0, 1]);
            },
            |m| {
                m.opts_mut().insert(DhcpOption::ServerIdentifier([10, 0, 0, 1].into()));
            },
        ];
        for change in change {
            let mut asked = question(MessageType::Request, Some(OWN));
            change(&mut asked);
            assert!(ask(&asked).is_none(), "{asked:?}");
        }
    }

    #[test]
    fn a_hardware_address_of_any_length_does_no_harm() {
        let offer = Offer::default();
        for length in 0..=255 {
            let mut bytes = question(MessageType::Discover, None).to_vec().unwrap();
            bytes[2] = length;
            assert_eq!(answer(&bytes, &net(), &offer).is_some(), length == 6);
        }
    }

    #[test]
    fn an_option_of_any_length_does_no_harm() {
        let asked = question(MessageType::Discover, None).to_vec().unwrap();
        let (offer, options) = (Offer::default(), &asked[..asked.len() - 1]);
        for (code, length) in (1..255).flat_map(|code| (0..20).map(move |length| (code, length))) {
            let option = [&[code, length][..], &vec![0xff; length.into()]].concat();
            let said = answer(&[options, &option, &[255]].concat(), &net(), &offer);
            // Those of the question itself are read; what is in all others does not matter.
            assert!(said.is_some() || [53, 54].contains(&code), "{code} {length}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_from_a_guest_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..600),
        ) {
            let _ = answer(&bytes, &net(), &Offer::default());
        }

        /// The same with a header that is one, so that the options are read.
        #[test]
        fn no_options_from_a_guest_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut asked = question(MessageType::Discover, None).to_vec().unwrap();
            asked.pop();
            asked.extend(bytes);
            let _ = answer(&asked, &net(), &Offer::default());
        }
    }
}
