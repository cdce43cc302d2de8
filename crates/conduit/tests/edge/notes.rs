//! What two ends of the kernel's tunnel tell each other goes by the edge, which passes it on.

use crate::rig::{LIMIT, Rig, translated};
use conduit::{
    PathKind,
    secure::Note,
    wire::{self, EdgeSays, HostSays, Peer},
};
use identity::{HostName, Reader, Security, Stream, Writer};
use std::{io::BufReader, net::Ipv4Addr};

struct Host {
    reader: BufReader<Reader>,
    writer: Writer,
}

fn overlay(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, last)
}

impl Host {
    fn join(rig: &Rig, name: &str, last: u8) -> Self {
        let (edge, its) = ("10.88.0.1:7450".parse().unwrap(), HostName::new("edge").unwrap());
        let connect = || Stream::connect(edge, &its, &Security::Plaintext, LIMIT).unwrap();
        let stream = rig.edge_space.run(connect);
        stream.control().set_read_timeout(Some(LIMIT));
        let (reader, writer) = stream.split();
        let mut host = Self { reader: BufReader::new(reader), writer };
        let peer = Peer { overlay: overlay(last), underlay: Ipv4Addr::new(10, 88, 0, last) };
        let (version, path) = (wire::VERSION, PathKind::Bpf);
        host.say(&HostSays::Hello { version, host: name.into(), peer, path });
        // It is on the list of those that are told when the edge answers something else.
        host.ping(1);
        host
    }

    fn say(&mut self, message: &HostSays) {
        wire::send(&mut self.writer, message).unwrap();
    }

    /// Everything that comes until `last` says that it is the last.
    fn hear(&mut self, last: impl Fn(&EdgeSays) -> bool) -> Vec<EdgeSays> {
        let mut heard = Vec::new();
        loop {
            let message = wire::receive::<EdgeSays>(&mut self.reader).unwrap().expect("an edge");
            heard.push(message);
            if heard.last().is_some_and(&last) {
                return heard;
            }
        }
    }

    fn ping(&mut self, id: u64) -> Vec<EdgeSays> {
        self.say(&HostSays::Ping { id });
        self.hear(|said| *said == EdgeSays::Done { id })
    }
}

#[test]
fn a_note_is_passed_on_to_whom_it_is_for_with_who_really_sent_it_and_is_lost_otherwise() {
    let rig = Rig::new(&translated());
    let (mut one, mut other) = (Host::join(&rig, "c", 98), Host::join(&rig, "d", 99));
    let note = |generation| Note::Want { generation };
    // Nobody, an edge that encrypts nothing, an agent that does not either.
    for last in [77, 1, 2] {
        one.say(&HostSays::Note { to: overlay(last), note: note(1) });
    }
    one.say(&HostSays::Note { to: overlay(99), note: note(2) });
    let heard = other.hear(|said| matches!(said, EdgeSays::Note { .. }));
    assert_eq!(heard.last(), Some(&EdgeSays::Note { from: overlay(98), note: note(2) }));
    other.say(&HostSays::Note { to: overlay(98), note: note(3) });
    let answered = one.hear(|said| matches!(said, EdgeSays::Note { .. }));
    assert_eq!(answered.last(), Some(&EdgeSays::Note { from: overlay(99), note: note(3) }));
    // Nothing of it comes twice, or to somebody else, and the connections go on.
    for host in [&mut one, &mut other] {
        let more = host.ping(9);
        assert!(!more.iter().any(|said| matches!(said, EdgeSays::Note { .. })), "{more:?}");
    }
}
