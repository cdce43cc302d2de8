//! Devices that move together, some of which store nothing for a while.

use super::*;
use crate::block::BlockSet;

const BLOCKS: u64 = 6000;
const WINDOW: u64 = 8 << 20;
const DEMAND: u64 = 4 << 20;

/// Both ends of a group's move; contents are left out.
struct Group {
    source: Source,
    destination: Destination,
    replicas: Vec<Replica>,
    now: Duration,
    /// Devices whose blocks are not stored.
    stuck: Vec<u16>,
    held: Vec<(LinkId, BlockHeader)>,
    sent: Vec<BlockHeader>,
    slot: u64,
}

impl Group {
    fn new(devices: u64) -> Self {
        let geometry = Geometry::new(BLOCKS * BLOCK, BLOCK as u32).unwrap();
        let session = SessionId([9; 16]);
        let term = Term { id: SessionId([1; 16]), first: Epoch(1) };
        let replicas: Vec<Replica> = (0..devices).map(|_| Replica::owned(geometry, term)).collect();
        for replica in &replicas {
            drop(replica.rounds().write(BlockRange::new(0, BLOCKS)));
        }
        let name = |at: usize| DeviceName::new(&format!("disk{at}")).unwrap();
        let all = replicas.iter().enumerate();
        let given = all.map(|(at, replica)| SourceDevice::new(name(at), None, replica)).collect();
        let taken = (0..replicas.len())
            .map(|at| {
                let replica = Replica::untouched(geometry);
                DestinationDevice { name: name(at), base: None, replica }
            })
            .collect();
        let policy = Policy { hold: true, pause: SECOND, ..Policy::default() };
        let config = source::Config {
            policy,
            window: WINDOW,
            demand_window: DEMAND,
            ..source::Config::default()
        };
        let source = Source::new(config, session, 1, given, Duration::ZERO);
        let config = destination::Config { prefetch: 0, ..destination::Config::default() };
        let hashes = Box::new(MemoryHashes::default());
        let destination = Destination::new(config, session, taken, hashes, Duration::ZERO);
        let (held, sent) = (Vec::new(), Vec::new());
        let (now, stuck) = (Duration::ZERO, Vec::new());
        Self { source, destination, replicas, now, stuck, held, sent, slot: 0 }
    }

    fn connect(&mut self) {
        self.destination.handle(self.now, destination::Event::Connected(LinkId(1)));
        self.source.handle(self.now, source::Event::Connected(LinkId(1)));
        self.settle();
    }

    fn settle(&mut self) {
        for _ in 0..100_000 {
            // A run is on its way beyond the budget at most, for each device.
            let most = WINDOW + DEMAND + self.replicas.len() as u64 * MAX_RUN;
            assert!(self.source.in_flight() <= most);
            if let Some(action) = self.source.poll(self.now) {
                self.source_does(action);
            } else if let Some(action) = self.destination.poll(self.now) {
                self.destination_does(action);
            } else {
                return;
            }
        }
        panic!("they never come to rest");
    }

    fn source_does(&mut self, action: source::Action) {
        use source::{Action, Event};
        let advance = |replicas: &[Replica]| -> Vec<Epoch> {
            replicas.iter().map(|replica| replica.rounds().advance(SECOND).unwrap()).collect()
        };
        match action {
            Action::Send(link, message) => {
                self.destination.handle(self.now, destination::Event::Received(link, message));
            }
            Action::Blocks(link, header) => {
                self.sent.push(header);
                if self.stuck.contains(&header.device.0) {
                    self.held.push((link, header));
                } else {
                    self.store(link, header);
                }
            }
            Action::CloseRound => {
                let epochs = advance(&self.replicas);
                self.source.handle(self.now, Event::RoundClosed(epochs));
            }
            Action::Quiesce(ticket) => {
                let epochs = advance(&self.replicas);
                let flushes = vec![Vec::new(); epochs.len()];
                let event = Event::Quiesced { ticket, epochs, flushes, state: Vec::new() };
                self.source.handle(self.now, event);
            }
            _ => {}
        }
    }

    fn store(&mut self, link: LinkId, header: BlockHeader) {
        self.slot += 1;
        let event = destination::Event::Blocks(link, header, self.slot);
        self.destination.handle(self.now, event);
    }

    fn destination_does(&mut self, action: destination::Action) {
        use destination::{Action, Event};
        match action {
            Action::Send(link, message) => {
                self.source.handle(self.now, source::Event::Received(link, message));
            }
            Action::Store { slot, .. } => {
                self.destination.handle(self.now, Event::Stored { slot, result: Ok(()) });
            }
            Action::Run { .. } => self.destination.handle(self.now, Event::Ran),
            Action::MakeDurable => self.destination.handle(self.now, Event::MadeDurable),
            _ => {}
        }
    }

    fn release(&mut self) {
        self.stuck.clear();
        for (link, header) in std::mem::take(&mut self.held) {
            self.store(link, header);
            self.settle();
        }
    }

    fn missing(&self, device: u16) -> u64 {
        self.destination.replica(DeviceIndex(device)).map_or(0, |r| r.absent().len())
    }
}

#[test]
fn devices_that_store_nothing_never_stop_the_others_of_their_group() {
    for stuck in [vec![0], vec![1, 2], vec![0, 1, 3]] {
        let mut group = Group::new(4);
        group.stuck.clone_from(&stuck);
        group.connect();
        for device in 0..4u16 {
            let all_there = group.missing(device) == 0;
            assert_eq!(all_there, !stuck.contains(&device), "device {device}, stuck: {stuck:?}");
        }
        group.release();
        assert!((0..4).all(|device| group.missing(device) == 0), "stuck: {stuck:?}");
    }
}

#[test]
fn what_is_demanded_of_a_device_goes_out_while_all_others_are_stuck() {
    let mut group = Group::new(3);
    group.stuck = vec![0, 1, 2];
    group.connect();
    group.source.handle(group.now, source::Event::Switch);
    group.now += SECOND;
    group.settle();
    // Everything that may be on its way is, and readers of two devices wait for many blocks.
    for waiter in 0..BLOCKS / 2 {
        let (at, device) = (BLOCKS - 1 - waiter / 2, DeviceIndex((waiter % 2) as u16));
        group.destination.read(group.now, device, one(at), WaiterId(waiter));
        group.settle();
    }
    let before = group.sent.len();
    group.destination.read(group.now, DeviceIndex(2), one(BLOCKS - 1), WaiterId(BLOCKS));
    group.settle();
    let demanded = &group.sent[before..];
    assert_eq!(demanded.len(), 1);
    assert_eq!((demanded[0].device, demanded[0].class), (DeviceIndex(2), Class::Demand));
    group.release();
    assert!((0..3).all(|device| group.missing(device) == 0));
}

#[test]
fn one_device_alone_has_the_whole_window() {
    let mut group = Group::new(1);
    group.stuck = vec![0];
    group.connect();
    assert_eq!(group.source.in_flight(), WINDOW);
    let mut blocks = BlockSet::new(BLOCKS);
    group.sent.iter().for_each(|header| blocks.insert_range(header.range));
    assert_eq!(blocks.len() * BLOCK, WINDOW);
}
