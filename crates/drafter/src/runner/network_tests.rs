//! What is owed to a network that answers by a script.

use super::*;
use std::{net::Ipv4Addr, sync::mpsc};

const LIMIT: Duration = Duration::from_secs(60);

/// A data path that is told what to answer, and tells what it was asked.
struct Scripted {
    answer: Mutex<Result<(), NetError>>,
    asked: Mutex<mpsc::Sender<u64>>,
    /// Taps that were asked for, and flips under which a machine was forgotten.
    prepared: Mutex<Vec<Option<Duration>>>,
    forgotten: Mutex<Vec<u64>>,
}

impl DataPath for Scripted {
    fn endpoint(&self) -> HostEndpoint {
        HostEndpoint(Ipv4Addr::LOCALHOST)
    }
    fn prepare(&self, net: &MachineNet) -> Result<Tap, NetError> {
        self.prepared.lock().unwrap().push(None);
        Err(dead(&net.machine))
    }
    fn prepare_for(&self, net: &MachineNet, blackout: Duration) -> Result<Tap, NetError> {
        self.prepared.lock().unwrap().push(Some(blackout));
        Err(dead(&net.machine))
    }
    fn pause(&self, _: &MachineNet, _: &Tap, _: &HostEndpoint, _: u64) -> Result<u64, NetError> {
        Ok(0)
    }
    fn resume(&self, _: &MachineNet, flip: u64) -> Result<(), NetError> {
        let _ = self.asked.lock().unwrap().send(flip);
        self.answer.lock().unwrap().clone()
    }
    fn forget(&self, _: &MachineNet, flip: u64) -> Result<(), NetError> {
        self.forgotten.lock().unwrap().push(flip);
        Ok(())
    }
}

fn dead(machine: &str) -> NetError {
    NetError::Failed {
        machine: machine.into(),
        operation: "take its frames".into(),
        detail: "nobody there".into(),
    }
}

struct Stage {
    network: Arc<Network>,
    path: Arc<Scripted>,
    asked: mpsc::Receiver<u64>,
    net: MachineNet,
}

impl Stage {
    /// Nobody answers.
    fn dead() -> Self {
        let (sender, asked) = mpsc::channel();
        let path = Arc::new(Scripted {
            answer: Mutex::new(Err(dead("redis"))),
            asked: Mutex::new(sender),
            prepared: Mutex::default(),
            forgotten: Mutex::default(),
        });
        let net =
            MachineNet::new("redis", Ipv4Addr::new(10, 77, 0, 1), [0x52, 0, 0, 0, 0, 1], 1400);
        Self { network: Network::over(path.clone()), path, asked, net }
    }

    fn answers(&self, answer: Result<(), NetError>) {
        *self.path.answer.lock().unwrap() = answer;
    }

    /// Waits until it is asked for `flip`.
    #[track_caller]
    fn asked_for(&self, flip: u64) {
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            if self.asked.recv_timeout(LIMIT).expect("it is asked") == flip {
                return;
            }
        }
        panic!("it was not asked for {flip}");
    }

    /// Waits until nothing is owed and nobody asks.
    #[track_caller]
    fn is_quiet(&self) {
        let until = Instant::now() + LIMIT;
        while self.network.lock().asking || self.network.lock().flip.is_some() {
            assert!(
                Instant::now() < until,
                "something is still owed: {:?}",
                self.network.trouble()
            );
            thread::sleep(Duration::from_millis(5));
        }
        self.asked.try_iter().for_each(drop);
    }

    /// And nothing is wrong either.
    #[track_caller]
    fn is_well(&self) {
        self.is_quiet();
        assert_eq!(self.network.trouble(), None);
    }
}

#[test]
fn a_flip_that_nobody_answered_is_asked_for_until_somebody_does() {
    let stage = Stage::dead();
    stage.network.lead_here(&stage.net, 7);
    for _ in 0..3 {
        stage.asked_for(7);
    }
    let trouble = stage.network.trouble().expect("it is said");
    assert!(trouble.contains("nobody there") && trouble.contains("conduit agent"), "{trouble}");
    stage.answers(Ok(()));
    stage.is_well();

    // Once it has been answered, another one is owed as well as the first.
    stage.answers(Err(dead("redis")));
    stage.network.lead_here_soon(&stage.net, 8);
    stage.asked_for(8);
    stage.asked_for(8);
    stage.answers(Ok(()));
    stage.is_well();
}

#[test]
fn a_newer_flip_takes_the_place_of_the_one_that_is_owed_and_an_older_one_does_not() {
    let stage = Stage::dead();
    stage.network.lead_here(&stage.net, 7);
    stage.network.lead_here(&stage.net, 9);
    stage.network.lead_here_soon(&stage.net, 8);
    assert_eq!(stage.network.lock().flip.as_ref().map(|owed| owed.flip), Some(9));
    stage.answers(Ok(()));
    stage.is_well();
}

#[test]
fn a_flip_that_is_refused_for_a_newer_one_is_owed_no_more() {
    let refusals = [
        NetError::StaleEpoch { machine: "redis".into(), asked: 7, current: 8 },
        NetError::EpochTaken { machine: "redis".into(), epoch: 7, owner: "10.0.0.2".into() },
    ];
    for refusal in refusals {
        let stage = Stage::dead();
        stage.network.lead_here(&stage.net, 7);
        stage.asked_for(7);
        stage.answers(Err(refusal.clone()));
        stage.is_quiet();
        // And is not owed in the first place.
        stage.network.lead_here(&stage.net, 7);
        assert!(stage.network.lock().flip.is_none(), "{refusal}");
        // But it is said, until the next flip.
        let trouble = stage.network.trouble().expect("it is said");
        assert!(trouble.contains(&refusal.to_string()), "{trouble}");
        stage.answers(Ok(()));
        stage.network.lead_here(&stage.net, 9);
        stage.is_well();
    }
}

#[test]
fn a_machine_that_leaves_or_ends_owes_no_flip() {
    let to = HostEndpoint(Ipv4Addr::new(10, 0, 0, 2));
    let ways: [fn(&Stage, HostEndpoint); 4] = [
        |stage, to| stage.network.divert(&stage.net, &to, 8).unwrap(),
        |stage, _| stage.network.forget(&stage.net, 7).unwrap(),
        |stage, _| stage.network.owe_nothing(),
        |stage, _| {
            stage.answers(Ok(()));
            stage.network.abort(&stage.net, 8).unwrap();
        },
    ];
    for way in ways {
        let stage = Stage::dead();
        stage.network.lead_here(&stage.net, 7);
        way(&stage, to);
        stage.is_well();
    }
}

#[test]
fn an_older_word_leaves_what_is_owed() {
    let stage = Stage::dead();
    stage.network.lead_here(&stage.net, 7);
    stage.network.forget(&stage.net, 6).unwrap();
    stage.asked_for(7);
    stage.asked_for(7);
    assert!(stage.network.trouble().is_some());
    stage.answers(Ok(()));
    stage.is_well();
}

#[test]
fn whoever_waits_for_the_network_is_told_that_it_does_not_answer_and_nothing_is_owed() {
    let stage = Stage::dead();
    stage.network.resume(&stage.net, 7).unwrap_err();
    assert!(stage.network.lock().flip.is_none());
}

#[test]
fn a_tap_that_was_begun_is_made_once_and_given_back_when_nobody_asks_for_it() {
    let Stage { network, path, net, .. } = Stage::dead();
    let prepared = || path.prepared.lock().unwrap().clone();
    let long = Some(Duration::MAX);
    network.make_tap(&net, long);
    assert!(network.tap(&net, long).is_err(), "what came of it is told to who asks");
    assert_eq!(prepared(), [long], "by the one that was begun");
    assert!(network.tap(&net, None).is_err());
    assert_eq!(prepared(), [long, None], "another is made when it is asked for");
    network.unmake_tap(7);
    assert!(path.forgotten.lock().unwrap().is_empty(), "nothing is left to be given back");

    network.make_tap(&net, None);
    network.unmake_tap(8);
    assert_eq!(prepared(), [long, None, None], "it is waited for");
    assert_eq!(*path.forgotten.lock().unwrap(), [8]);
}
