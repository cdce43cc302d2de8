//! Names of machines, as they ask for them (RFC 1034, 1035, 6891). No I/O.
//!
//! `NAME.DOMAIN` is the machine of that name in the asker's own network, and of no other: so tenants neither
//! see each other's machines nor whether they exist. Addresses lead back to names likewise. What is none of
//! this edge's is for somebody else ([`super::forward`]), or refused.
//!
//! What must hold: the bytes are a guest's; the network is not, it is that of the tap they came in by.

use crate::{agent::guests::label, datapath::NetworkId};
use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass, Name, RData, Record, RecordType,
        rdata::{A, AAAA, NS, PTR, SOA},
    },
};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Seconds that an answer may be used: names are given anew, addresses of one machine are for life.
const TTL: u32 = 30;
/// Likewise for a name that nobody has.
const TTL_NEGATIVE: u32 = 5;
/// Bytes of an answer by UDP that cross every path whole (RFC 9715).
const DATAGRAM: u16 = 1232;
/// Longest question.
const LONGEST: usize = 4096;

/// What is known of machines, of those that exist.
pub(crate) trait Machines {
    /// The addresses of a network's machine of that name (of large or small letters).
    fn by_name(&self, network: NetworkId, name: &str) -> Option<(Ipv4Addr, Option<Ipv6Addr>)>;
    /// The name of a network's machine of that address.
    fn by_address(&self, network: NetworkId, address: IpAddr) -> Option<String>;
    /// Whether this is an address of machines.
    fn is_inside(&self, address: IpAddr) -> bool;
}

/// What is to be done with a question.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// This is the answer.
    Answer(Vec<u8>),
    /// Others know the answer; by UDP it has at most so many bytes.
    Forward {
        /// The limit.
        datagram: usize,
    },
    /// No question, or none that can be answered.
    Nothing,
}

/// What this edge knows names of.
#[derive(Clone, Debug)]
pub(crate) struct Zone {
    domain: Name,
    forwards: bool,
}

impl Zone {
    /// `domain` as in `machine.internal`; `forwards`: others are asked for what is outside.
    pub(crate) fn new(domain: &str, forwards: bool) -> Result<Self, String> {
        let plain = domain.split('.').all(|part| label(part).as_deref() == Some(part));
        let mut name = Name::from_ascii(domain).map_err(|e| e.to_string())?;
        // Room for a label.
        if !plain || domain.len() > 180 {
            return Err("a domain is like machine.internal, of small letters, digits and -".into());
        }
        name.set_fqdn(true);
        Ok(Self { domain: name, forwards })
    }

    /// Judges a question of a machine in `network`; `stream`: it came by TCP.
    pub(crate) fn judge(
        &self,
        question: &[u8],
        network: NetworkId,
        stream: bool,
        machines: &impl Machines,
    ) -> Verdict {
        if question.len() > LONGEST {
            return Verdict::Nothing;
        }
        let Ok(asked) = Message::from_vec(question) else {
            return failure(question, ResponseCode::FormErr)
                .map_or(Verdict::Nothing, Verdict::Answer);
        };
        if asked.metadata.message_type != MessageType::Query {
            return Verdict::Nothing;
        }
        let datagram = usize::from(asked.max_payload().min(DATAGRAM));
        let mut said = Message::response(asked.metadata.id, asked.metadata.op_code);
        said.metadata.recursion_desired = asked.metadata.recursion_desired;
        said.metadata.recursion_available = self.forwards;
        if asked.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(DATAGRAM);
            said.set_edns(edns);
        }
        let mut code = ResponseCode::FormErr;
        if asked.metadata.op_code != OpCode::Query {
            code = ResponseCode::NotImp;
        } else if asked.version() > 0 {
            code = ResponseCode::BADVERS;
        } else if let [query] = asked.queries.as_slice() {
            said.add_query(query.clone());
            match self.look_up(query, network, machines) {
                Some(found) => {
                    code = found.code;
                    said.metadata.authoritative = true;
                    if found.records.is_empty() {
                        said.add_authority(self.authority());
                    }
                    said.add_answers(found.records);
                }
                None if self.forwards && asked.metadata.recursion_desired => {
                    return Verdict::Forward { datagram };
                }
                None => code = ResponseCode::Refused,
            }
        }
        said.metadata.response_code = code;
        let Ok(bytes) = said.to_vec() else { return Verdict::Nothing };
        if stream || bytes.len() <= datagram {
            return Verdict::Answer(bytes);
        }
        said.truncate().to_vec().map_or(Verdict::Nothing, Verdict::Answer)
    }

    fn look_up(
        &self,
        query: &Query,
        network: NetworkId,
        machines: &impl Machines,
    ) -> Option<Found> {
        if query.query_class != DNSClass::IN {
            return None;
        }
        let (name, kind) = (&query.name, query.query_type);
        let wants = |one| kind == one || kind == RecordType::ANY;
        let record = |data| Record::from_rdata(name.clone(), TTL, data);
        if self.domain.zone_of(name) {
            if self.domain.num_labels() == name.num_labels() {
                let start = [(RecordType::SOA, self.start()), (RecordType::NS, self.server())];
                let start = start.into_iter().filter(|(one, _)| wants(*one));
                return Some(Found::known(start.map(|(_, data)| record(data)).collect()));
            }
            let one_more = name.num_labels() == self.domain.num_labels() + 1;
            let first = name.iter().next().filter(|_| one_more);
            let first = first.and_then(|first| std::str::from_utf8(first).ok()).and_then(label);
            let found = first.and_then(|first| machines.by_name(network, &first));
            let Some((v4, v6)) = found else { return Some(Found::nobody()) };
            let v4 = wants(RecordType::A).then(|| record(RData::A(A(v4))));
            let v6 = v6.filter(|_| wants(RecordType::AAAA)).map(|v6| record(RData::AAAA(AAAA(v6))));
            return Some(Found::known(v4.into_iter().chain(v6).collect()));
        }
        let address = name.parse_arpa_name().ok()?;
        let whole = address.prefix_len() == address.max_prefix_len();
        let address = address.addr();
        if !whole || !machines.is_inside(address) {
            return None;
        }
        let found = machines.by_address(network, address).and_then(|m| label(&m));
        let found = found.and_then(|label| self.domain.prepend_label(label.as_str()).ok());
        let Some(machine) = found else { return Some(Found::nobody()) };
        let pointer = wants(RecordType::PTR).then(|| record(RData::PTR(PTR(machine))));
        Some(Found::known(pointer.into_iter().collect()))
    }

    fn server(&self) -> RData {
        RData::NS(NS(self.domain.clone()))
    }

    fn start(&self) -> RData {
        let (own, negative) = (self.domain.clone(), TTL_NEGATIVE);
        RData::SOA(SOA::new(own.clone(), own, 1, 3600, 600, 86_400, negative))
    }

    /// What a negative answer says of how long it may be used (RFC 2308).
    fn authority(&self) -> Record {
        Record::from_rdata(self.domain.clone(), TTL_NEGATIVE, self.start())
    }
}

/// What there is under a name.
struct Found {
    code: ResponseCode,
    records: Vec<Record>,
}

impl Found {
    fn known(records: Vec<Record>) -> Self {
        Self { code: ResponseCode::NoError, records }
    }

    fn nobody() -> Self {
        Self { code: ResponseCode::NXDomain, records: Vec::new() }
    }
}

/// An answer that says no more than that something went wrong; `None` if this was no question.
pub(crate) fn failure(question: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    const ANSWER: u8 = 0x80;
    // The answer's bit is not set, and what was asked for stays: operation, and recursion desired.
    let header = question.first_chunk::<12>().filter(|h| h[2] & ANSWER == 0)?;
    let mut said = vec![header[0], header[1], ANSWER | header[2] & 0x79, code.low()];
    said.resize(12, 0);
    Some(said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Two;

    impl Machines for Two {
        fn by_name(&self, network: NetworkId, name: &str) -> Option<(Ipv4Addr, Option<Ipv6Addr>)> {
            match (network.0, name) {
                (7, "web") => Some(([10, 77, 0, 5].into(), "fd77::5".parse().ok())),
                (9, "web") => Some(([10, 77, 0, 6].into(), None)),
                _ => None,
            }
        }

        fn by_address(&self, network: NetworkId, address: IpAddr) -> Option<String> {
            let web = address == IpAddr::from([10, 77, 0, 5])
                || address == IpAddr::V6("fd77::5".parse().unwrap());
            (network.0 == 7 && web).then(|| "Web".to_owned())
        }

        fn is_inside(&self, address: IpAddr) -> bool {
            match address {
                IpAddr::V4(v4) => v4.octets()[..2] == [10, 77],
                IpAddr::V6(v6) => v6.segments()[0] == 0xfd77,
            }
        }
    }

    fn question(name: &str, kind: RecordType) -> Message {
        let mut asked = Message::new(77, MessageType::Query, OpCode::Query);
        asked.metadata.recursion_desired = true;
        asked.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        asked
    }

    fn zone(forwards: bool) -> Zone {
        Zone::new("machine.internal", forwards).unwrap()
    }

    /// The code of an answer, and its records' data as text.
    fn ask(network: u16, name: &str, kind: RecordType) -> (ResponseCode, Vec<String>) {
        let asked = question(name, kind).to_vec().unwrap();
        match zone(false).judge(&asked, NetworkId(network), false, &Two) {
            Verdict::Answer(bytes) => {
                let said = Message::from_vec(&bytes).unwrap();
                assert_eq!(said.metadata.id, 77);
                let text = said.answers.iter().map(|r| r.data.to_string()).collect();
                (said.metadata.response_code, text)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_name_is_the_machine_of_the_askers_own_network() {
        use RecordType as R;
        use ResponseCode as C;
        let web = "WEB.machine.Internal.";
        let one = |text: &str| vec![text.to_owned()];
        assert_eq!(ask(7, web, R::A), (C::NoError, one("10.77.0.5")));
        assert_eq!(ask(7, web, R::AAAA), (C::NoError, one("fd77::5")));
        assert_eq!(ask(9, web, R::A), (C::NoError, one("10.77.0.6")));
        assert_eq!(ask(9, web, R::AAAA), (C::NoError, vec![]));
        assert_eq!(ask(7, web, R::MX), (C::NoError, vec![]));
        assert_eq!(ask(8, web, R::A), (C::NXDomain, vec![]));
        assert_eq!(ask(7, "x.web.machine.internal.", R::A), (C::NXDomain, vec![]));
        assert_eq!(ask(7, "machine.internal.", R::NS), (C::NoError, one("machine.internal.")));
    }

    #[test]
    fn an_address_leads_to_the_name_in_the_askers_own_network() {
        use RecordType as R;
        use ResponseCode as C;
        let reverse = "5.0.77.10.in-addr.arpa.";
        let web = vec!["web.machine.internal.".to_owned()];
        assert_eq!(ask(7, reverse, R::PTR), (C::NoError, web.clone()));
        assert_eq!(ask(9, reverse, R::PTR), (C::NXDomain, vec![]));
        let v6 = format!("5.{}7.7.d.f.ip6.arpa.", "0.".repeat(27));
        assert_eq!(ask(7, &v6, R::PTR), (C::NoError, web));
        assert_eq!(ask(7, "8.8.8.8.in-addr.arpa.", R::PTR), (C::Refused, vec![]));
        assert_eq!(ask(7, "77.10.in-addr.arpa.", R::PTR), (C::Refused, vec![]));
    }

    #[test]
    fn other_names_are_forwarded_or_refused() {
        let asked = question("example.org.", RecordType::A).to_vec().unwrap();
        let judged = zone(true).judge(&asked, NetworkId(7), false, &Two);
        assert_eq!(judged, Verdict::Forward { datagram: 512 });
        assert_eq!(ask(7, "example.org.", RecordType::A), (ResponseCode::Refused, vec![]));
        let mut alone = question("example.org.", RecordType::A);
        alone.metadata.recursion_desired = false;
        let judged = zone(true).judge(&alone.to_vec().unwrap(), NetworkId(7), false, &Two);
        assert!(matches!(judged, Verdict::Answer(_)), "{judged:?}");
    }

    #[test]
    fn what_is_no_question_gets_an_error_or_nothing() {
        let judge = |bytes: &[u8]| zone(true).judge(bytes, NetworkId(7), false, &Two);
        let code = |bytes: &[u8]| match judge(bytes) {
            Verdict::Answer(bytes) => Message::from_vec(&bytes).unwrap().metadata.response_code,
            other => panic!("{other:?}"),
        };
        assert_eq!(judge(b"short"), Verdict::Nothing);
        let mut asked = question("web.machine.internal.", RecordType::A);
        let whole = asked.to_vec().unwrap();
        assert_eq!(code(&whole[..whole.len() - 3]), ResponseCode::FormErr);
        asked.metadata.op_code = OpCode::Update;
        assert_eq!(code(&asked.to_vec().unwrap()), ResponseCode::NotImp);
        let mut two = question("web.machine.internal.", RecordType::A);
        two.add_query(two.queries[0].clone());
        assert_eq!(code(&two.to_vec().unwrap()), ResponseCode::FormErr);
        two.metadata.message_type = MessageType::Response;
        assert_eq!(judge(&two.to_vec().unwrap()), Verdict::Nothing, "an answer is not answered");
    }

    #[test]
    fn domains_are_plain() {
        for bad in ["", ".", "Machine.internal", "a..b", "a b", "-a", &"a.".repeat(100)] {
            assert!(Zone::new(bad, false).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_from_a_guest_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), stream: bool,
        ) {
            let _ = zone(true).judge(&bytes, NetworkId(7), stream, &Two);
        }
    }
}
