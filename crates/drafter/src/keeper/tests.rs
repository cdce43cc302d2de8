//! Keepers with real sockets, clocks and a folder of leases, in threads of this process.

use super::{
    Client, Place, Said, Settings, serve, socket,
    wire::{FromKeeper, ToKeeper, hear, say},
};
use crate::lease::{
    AttemptId, BeatName, BeatRef, BootClock, BootTime, Clock as _, Epoch, FileStore, HostName,
    LeaseStore as _, MachineName, Nonce, Outcome, Record,
};
use std::{
    io::{BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::mpsc::{self, Receiver},
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(20);
const TERM: Duration = Duration::from_millis(1000);

struct Host {
    folder: tempfile::TempDir,
    store: FileStore,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = FileStore::open(&folder.path().join("leases"), LIMIT).unwrap();
        Self { folder, store }
    }

    fn leases(&self) -> String {
        self.folder.path().join("leases").display().to_string()
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    fn settings(&self) -> Settings {
        Settings {
            state: self.state(),
            host: "a".into(),
            leases: self.leases(),
            term_ms: TERM.as_millis() as u64,
            renewal_ms: 200,
            // Longer than any of these: a thread that is left ends with the process.
            linger_ms: None,
        }
    }

    /// Keeps, on a thread.
    fn keep(&self) {
        let settings = self.settings();
        std::thread::spawn(move || serve(&settings, true).unwrap());
        until("the keeper listens", || UnixStream::connect(socket(&self.state())).is_ok());
    }

    fn place(&self, machine: &str) -> Place {
        Place {
            state: self.state(),
            host: HostName::new("a").unwrap(),
            leases: self.leases(),
            machine: MachineName::new(machine).unwrap(),
            term: TERM,
            renewal: Duration::from_millis(200),
        }
    }

    fn client(&self, machine: &str) -> (Client, Receiver<Said>) {
        let (said, hears) = mpsc::channel();
        let client = Client::begin(self.place(machine), move |words| said.send(words).is_ok());
        (client.unwrap(), hears)
    }

    /// A connection that speaks for itself.
    fn raw(&self) -> (UnixStream, BufReader<UnixStream>) {
        let stream = UnixStream::connect(socket(&self.state())).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        (stream, reader)
    }

    fn hello(&self, machine: &str) -> ToKeeper {
        let (host, leases, machine) = ("a".into(), self.leases(), machine.into());
        ToKeeper::Hello { host, leases, machine, term_ms: TERM.as_millis() as u64 }
    }

    /// A machine whose lease refers to the host's life.
    fn bound(&self, machine: &str, life: &BeatRef) -> Record {
        let name = MachineName::new(machine).unwrap();
        let host = HostName::new("a").unwrap();
        let record = Record::first(name.clone(), host, AttemptId(1), Nonce(1));
        let record = record.bound(Some(life.clone()));
        let set = self.store.compare_and_set(&name, None, &record).unwrap();
        assert_eq!(set, Outcome::Won);
        record
    }

    fn record(&self, machine: &str) -> Record {
        self.store.read(&MachineName::new(machine).unwrap()).unwrap().unwrap()
    }
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The next view that says until when, taken as it comes.
#[track_caller]
fn next_view(client: &Client, hears: &Receiver<Said>) -> (BeatRef, BootTime, u64) {
    loop {
        let words = hears.recv_timeout(LIMIT).unwrap();
        if let Said::View { number, view, serial, .. } = words {
            client.took(number);
            if let Some(view) = view {
                return (view.of, view.until, serial);
            }
        }
    }
}

/// The next view of a connection that takes nothing by itself.
#[track_caller]
fn raw_view(reader: &mut BufReader<UnixStream>) -> (u64, Option<BootTime>) {
    match hear::<FromKeeper>(reader).unwrap() {
        Some(FromKeeper::View { number, life, .. }) => {
            (number, life.map(|life| BootTime(Duration::from_nanos(life.until_ns))))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_runners_of_a_host_hear_of_one_life_and_the_store_sees_one_write_a_renewal() {
    let host = Host::new();
    host.keep();
    let clients: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| host.client(name)).collect();
    let name = BeatName::of_host(HostName::new("a").unwrap());
    let mut last = 0;
    for _ in 0..4 {
        for (client, hears) in &clients {
            let (life, until, serial) = next_view(client, hears);
            assert_eq!(life, BeatRef { name: name.clone(), incarnation: 1 });
            assert!(until > BootClock.now(), "it holds for a term from its renewal");
            last = last.max(serial);
        }
    }
    let beat = host.store.read_beat(&name).unwrap().unwrap();
    assert!(beat.serial >= last && beat.serial <= last + 2, "{} and {last}", beat.serial);
    for machine in ["m1", "m2", "m3"] {
        let own = BeatName::of_runner(name.host().clone(), MachineName::new(machine).unwrap());
        assert_eq!(host.store.read_beat(&own).unwrap(), None);
    }
}

#[test]
fn a_machine_whose_runner_is_gone_is_given_up_when_all_is_over_that_it_was_told_and_not_before() {
    let host = Host::new();
    host.keep();
    let (other, other_hears) = host.client("other");
    let (client, hears) = host.client("m1");
    let (life, _, _) = next_view(&client, &hears);
    let record = host.bound("m1", &life);
    host.bound("other", &life);
    // Dead without a word. What was on its way may still have been told.
    drop(client);
    let told = hears.iter().filter_map(|words| match words {
        Said::View { view, .. } => view.map(|view| view.until),
        _ => None,
    });
    let told = told.max().unwrap_or_default();
    until("it is given up", || {
        next_view(&other, &other_hears);
        let now = BootClock.now();
        let found = host.record("m1");
        assert!(found == record || now >= told, "given up {:?} too early", told.since(now));
        found != record
    });
    let found = host.record("m1");
    assert_eq!((found.epoch, &found.owner), (record.epoch, &record.owner));
    let over = found.beat.unwrap();
    let beat = host.store.read_beat(&over.name).unwrap().unwrap();
    assert!(over.name != life.name && beat.ends(&over), "a taker need not wait: {beat:?}");
    // Whoever comes back hears so first, and the other machine is as it was.
    let (_client, hears) = host.client("m1");
    let first = hears.recv_timeout(LIMIT).unwrap();
    assert!(
        matches!(first, Said::Welcome { given_up: Some(Epoch(1)), .. }),
        "it may run by a lease that was given up: {first:?}"
    );
    assert_eq!(host.record("other").beat, Some(life));
}

#[test]
fn a_runner_that_comes_in_time_or_says_goodbye_gives_nothing_up() {
    let host = Host::new();
    host.keep();
    let (client, hears) = host.client("m1");
    let (life, _, _) = next_view(&client, &hears);
    let record = host.bound("m1", &life);
    drop(client);
    let (client, hears) = host.client("m1");
    let first = hears.recv_timeout(LIMIT).unwrap();
    assert!(matches!(first, Said::Welcome { given_up: None, .. }), "{first:?}");
    let long_after = BootClock.now() + 3 * TERM;
    while BootClock.now() < long_after {
        next_view(&client, &hears);
    }
    assert_eq!(host.record("m1"), record);
    client.goodbye();
    let (other, hears) = host.client("other");
    let long_after = BootClock.now() + 2 * TERM;
    while BootClock.now() < long_after {
        next_view(&other, &hears);
    }
    assert_eq!(host.record("m1"), record);
}

#[test]
fn one_that_takes_nothing_in_is_told_no_later_end_and_its_machine_is_given_up() {
    let host = Host::new();
    host.keep();
    let (other, other_hears) = host.client("other");
    let (life, _, _) = next_view(&other, &other_hears);
    let record = host.bound("m1", &life);
    let (stream, mut reader) = host.raw();
    say(&stream, &host.hello("m1")).unwrap();
    let welcome = hear::<FromKeeper>(&mut reader).unwrap();
    assert!(matches!(welcome, Some(FromKeeper::Welcome { given_up: None, .. })), "{welcome:?}");
    let (number, end) = raw_view(&mut reader);
    let end = end.unwrap();
    // Not the number that was said: as if it had said nothing.
    say(&stream, &ToKeeper::Took { number: number + 1 }).unwrap();
    until("it is given up", || {
        next_view(&other, &other_hears);
        let (now, found) = (BootClock.now(), host.record("m1"));
        assert!(found == record || now >= end, "given up too early");
        found != record
    });
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty(), "it was told more: {}", String::from_utf8_lossy(&rest));
}

#[test]
fn who_does_not_belong_here_hears_why_and_harms_nobody() {
    let host = Host::new();
    host.keep();
    let (client, hears) = host.client("m1");
    let (life, _, _) = next_view(&client, &hears);
    let hello = |host: &str, leases: String, machine: &str, term_ms| ToKeeper::Hello {
        host: host.into(),
        leases,
        machine: machine.into(),
        term_ms,
    };
    let wrong = [
        (hello("b", host.leases(), "m2", 1000), "host \"a\""),
        (hello("a", "/elsewhere".into(), "m2", 1000), "another lease store"),
        (hello("a", host.leases(), "m2", 3000), "the same --term"),
        (hello("a", host.leases(), "../m2", 1000), "name"),
    ];
    for (words, why) in wrong {
        let (stream, mut reader) = host.raw();
        say(&stream, &words).unwrap();
        let answer = hear::<FromKeeper>(&mut reader).unwrap();
        let Some(FromKeeper::Refused { why: said, again: false }) = answer else {
            panic!("{answer:?}");
        };
        assert!(said.contains(why), "{said}");
        assert_eq!(hear::<FromKeeper>(&mut reader).unwrap(), None);
    }
    for nonsense in
        [&b"{}\n"[..], b"\xff\xfe\n", b"{\"say\":\"took\",\"number\":7}\n", &vec![b'x'; 100_000]]
    {
        let (mut stream, _) = host.raw();
        let _ = stream.write_all(nonsense);
    }
    let (stream, mut reader) = host.raw();
    say(&stream, &host.hello("m3")).unwrap();
    hear::<FromKeeper>(&mut reader).unwrap();
    // A second hello is the end.
    say(&stream, &host.hello("m1")).unwrap();
    while let Ok(Some(FromKeeper::View { .. })) = hear(&mut reader) {}
    for _ in 0..5 {
        assert_eq!(next_view(&client, &hears).0, life);
    }
}

#[test]
fn there_is_one_keeper_for_a_state_directory_and_it_ends_when_nobody_needs_it() {
    let host = Host::new();
    let settings = Settings { linger_ms: Some(300), ..host.settings() };
    let (done, ended) = mpsc::channel();
    let first = settings.clone();
    std::thread::spawn(move || done.send(serve(&first, true).map_err(|e| e.to_string())));
    until("it listens", || UnixStream::connect(socket(&host.state())).is_ok());
    let (client, hears) = host.client("m1");
    next_view(&client, &hears);
    assert!(serve(&settings, false).is_ok(), "one too many ends without a word");
    let error = serve(&settings, true).unwrap_err().to_string();
    assert!(error.contains("runs already"), "{error}");
    assert!(ended.try_recv().is_err());
    client.goodbye();
    ended.recv_timeout(LIMIT).unwrap().unwrap();
    assert!(!socket(&host.state()).exists());
    for (term_ms, renewal_ms) in [(100, 10), (1000, 0), (1000, 900), (u64::MAX, 1000)] {
        let bad = Settings { term_ms, renewal_ms, ..host.settings() };
        assert!(serve(&bad, true).is_err(), "{bad:?}");
    }
}

#[test]
fn runners_that_it_refuses_do_not_keep_it_from_ending() {
    let host = Host::new();
    let settings = Settings { linger_ms: Some(300), ..host.settings() };
    let (done, ended) = mpsc::channel();
    std::thread::spawn(move || done.send(serve(&settings, true).map_err(|e| e.to_string())));
    until("it listens", || UnixStream::connect(socket(&host.state())).is_ok());
    // Of a host whose lease store was changed meanwhile: no keeper for the new one while this runs.
    until("it ends", || {
        if let Ok(stream) = UnixStream::connect(socket(&host.state())) {
            let hello = ToKeeper::Hello {
                host: "a".into(),
                leases: "/elsewhere".into(),
                machine: "m2".into(),
                term_ms: 1000,
            };
            let _ = say(&stream, &hello);
            let _ = hear::<FromKeeper>(&mut BufReader::new(stream));
        }
        ended.try_recv().is_ok()
    });
}

#[test]
fn one_whose_socket_is_removed_is_found_again_and_its_end_takes_no_other_ones_away() {
    let host = Host::new();
    host.keep();
    let (one, hears) = host.client("one");
    let (life, ..) = next_view(&one, &hears);
    // The first has its connection; those that come later start none while that one runs.
    std::fs::remove_file(socket(&host.state())).unwrap();
    let (two, hears) = host.client("two");
    let (same, ..) = next_view(&two, &hears);
    assert_eq!(life, same);

    let path = host.folder.path().join("socket");
    let (inputs, _received) = mpsc::channel();
    let named = super::server::Named::at(path.clone(), &inputs).unwrap();
    assert!(named.is_there());
    let other = super::server::Named::at(path.clone(), &inputs).unwrap();
    assert!(!named.is_there() && other.is_there());
    drop(named);
    assert!(other.is_there(), "it took the other one's");
    drop(other);
    assert!(!path.exists());
}
