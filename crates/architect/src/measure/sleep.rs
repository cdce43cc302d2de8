//! `handover.suspend.` and `handover.resume.`: a machine that goes to sleep in a store in a folder, and
//! wakes on the other host.
//!
//! A guest of 512 MiB with Redis, into which 50 MiB of noise are written. Twice: as it is after its boot,
//! when the store has nothing of it, and after it was resumed and 50 MiB were written anew. Each time the
//! suspend counts until the generation is durable, the resume from the command's start until Redis answers
//! a new connection; every value is read again and compared.

use super::{
    Setting,
    groups::{none_of, spread},
    ours,
    store::LocalStore,
};
use crate::{
    fleet::{Fleet, MachineSpec, RunnerId},
    rig::{MACHINE, PUBLIC, Rig, RigConfig},
};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use drafter::runner::api::{Request, SuspendReport};
use std::{
    fmt::Write as _,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// Beginnings of these bars' names.
pub(super) const BARS: &[&str] = &["handover.suspend.", "handover.resume."];

const MEMORY_MIB: u64 = 512;
/// What is written: values, and bytes of each.
const VALUES: usize = 800;
const VALUE: usize = 64 << 10;
const REDIS: u16 = 6379;
/// The port of the first machine at the edge.
const PORT: u16 = 16_600;
/// Machines, each suspended and resumed twice.
const MACHINES: usize = 5;
const BOOT: Duration = Duration::from_secs(90);
const LIMIT: Duration = Duration::from_secs(60);
/// How often a new connection asks, while the machine wakes.
const ASK: Duration = Duration::from_millis(20);
/// Seconds.
const SUSPEND: f64 = 0.5;
const RESUME: f64 = 0.3;
const MIB: f64 = 1_048_576.0;

struct Site {
    fleet: Fleet,
    store: LocalStore,
}

/// One sleep.
struct Sleep {
    suspended: SuspendReport,
    /// From the start of the command to the first answer.
    answered: Duration,
    /// Values that are not what was written.
    wrong: u64,
}

/// What value `number` of `seed` is: nothing that compresses, and none like another.
fn value(seed: u64, number: usize) -> Vec<u8> {
    let mut state = seed << 32 | number as u64 | 1 << 63;
    let mut bytes = Vec::with_capacity(VALUE);
    while bytes.len() < VALUE {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes
}

fn command(words: &[&[u8]]) -> Vec<u8> {
    let mut text = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        text.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        text.extend_from_slice(word);
        text.extend_from_slice(b"\r\n");
    }
    text
}

/// A line of an answer.
fn line(from: &mut impl BufRead) -> io::Result<String> {
    let mut text = String::new();
    from.read_line(&mut text)?;
    Ok(text.trim_end().to_owned())
}

/// Asks once, over a connection of its own.
fn ping(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(&command(&[b"PING"]))?;
    match line(&mut BufReader::new(stream))?.as_str() {
        "+PONG" => Ok(()),
        other => Err(io::Error::other(format!("answered {other:?}"))),
    }
}

impl Site {
    fn new(setting: &Setting) -> anyhow::Result<Self> {
        let config =
            RigConfig { prefix: setting.prefix.clone(), leases: true, ..RigConfig::default() };
        let rig = Rig::new(config).context("building the rig")?;
        ours::clear(&rig);
        let fleet = Fleet::new(rig)?;
        let store = LocalStore::new().context("making a folder for the store")?;
        Ok(Self { fleet, store })
    }

    fn spec(setting: &Setting, number: usize) -> MachineSpec {
        let mut spec = MachineSpec::new(&format!("sleeper-{number}"), &setting.package);
        let [a, b, c, first] = MACHINE.octets();
        spec.memory_mib = Some(MEMORY_MIB);
        spec.address = Some(Ipv4Addr::new(a, b, c, first + number as u8));
        spec.ports = vec![(PORT + number as u16, REDIS)];
        spec.extra = vec!["--accelerator".into(), setting.accelerator.clone()];
        spec
    }

    /// A connection to the machine's Redis.
    fn connect(&self, to: SocketAddr) -> anyhow::Result<BufReader<TcpStream>> {
        let connect = || TcpStream::connect_timeout(&to, LIMIT);
        let stream = self.fleet.rig().client().run(connect)??;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(BufReader::new(stream))
    }

    fn fill(&self, to: SocketAddr, seed: u64) -> anyhow::Result<()> {
        let mut redis = self.connect(to)?;
        for number in 0..VALUES {
            let key = format!("value-{number}");
            let set = command(&[b"SET", key.as_bytes(), &value(seed, number)]);
            redis.get_mut().write_all(&set)?;
            let said = line(&mut redis)?;
            ensure!(said == "+OK", "Redis answered {said:?} to a write");
        }
        Ok(())
    }

    /// How many values are not what was written.
    fn wrong(&self, to: SocketAddr, seed: u64) -> anyhow::Result<u64> {
        let mut redis = self.connect(to)?;
        let mut wrong = 0;
        let mut bytes = vec![0; VALUE + 2];
        for number in 0..VALUES {
            let key = format!("value-{number}");
            redis.get_mut().write_all(&command(&[b"GET", key.as_bytes()]))?;
            let said = line(&mut redis)?;
            ensure!(said == format!("${VALUE}"), "Redis answered {said:?} to a read");
            redis.read_exact(&mut bytes)?;
            wrong += u64::from(bytes[..VALUE] != value(seed, number));
        }
        Ok(wrong)
    }

    fn suspend(&self, at: RunnerId, name: &str) -> anyhow::Result<SuspendReport> {
        let request = self.store.backup(&format!("machines/{name}.suspended"));
        let mut client = self.fleet.runner(at).client()?;
        client.set_deadline(Some(LIMIT))?;
        Ok(client.get(&Request::SuspendToStore(request))?)
    }

    /// Suspends the machine at `at`, and resumes it on another host.
    fn sleep(
        &mut self,
        at: RunnerId,
        host: usize,
        spec: &MachineSpec,
        to: SocketAddr,
        seed: u64,
    ) -> anyhow::Result<(RunnerId, Sleep)> {
        let suspended = self.suspend(at, &spec.name)?;
        let keys = self.store.keys().display().to_string();
        let package = spec.package.display().to_string();
        let words =
            ["resume", &spec.name, "--store", &self.store.url(), "--keys", &keys, "--package"];
        let mut words: Vec<String> = words.map(str::to_owned).into();
        words.push(package);
        let (answer, answers) = mpsc::channel();
        let awake = Arc::new(AtomicBool::new(false));
        let asking = {
            let (awake, client) = (Arc::clone(&awake), self.fleet.rig().client().clone());
            std::thread::spawn(move || client.run(|| ask(to, &awake, &answer)))
        };
        let began = Instant::now();
        let started = self.fleet.start(host, spec, words);
        let answered = started.as_ref().ok().and_then(|_| answers.recv_timeout(LIMIT).ok());
        awake.store(true, Ordering::SeqCst);
        // It has no error of its own, and a panic was told.
        let _ = asking.join();
        let next = started?;
        let answered: Instant = answered.context("Redis does not answer after the resume")?;
        let wrong = self.wrong(to, seed)?;
        let sleep = Sleep { suspended, answered: answered - began, wrong };
        println!("   {}", sleep.line());
        Ok((next, sleep))
    }

    fn retire(&self, at: RunnerId) {
        if let Ok(mut client) = self.fleet.runner(at).client() {
            let _ = client.call(&Request::Stop { grace_s: 0 }, |_| {});
        }
    }
}

/// Asks over new connections, several at a time, until one is answered.
fn ask(to: SocketAddr, awake: &Arc<AtomicBool>, answer: &mpsc::Sender<Instant>) {
    while !awake.load(Ordering::SeqCst) {
        let (awake, answer) = (Arc::clone(awake), answer.clone());
        let asking = std::thread::Builder::new().spawn(move || {
            if ping(to).is_ok() {
                let _ = answer.send(Instant::now());
                awake.store(true, Ordering::SeqCst);
            }
        });
        drop(asking);
        std::thread::sleep(ASK);
    }
}

impl Sleep {
    fn line(&self) -> String {
        let SuspendReport { total_ms, paused_ms, stored_bytes, new_bytes, .. } = &self.suspended;
        let mut text = format!(
            "durable after {total_ms:.0} ms ({paused_ms:.0} of them paused), {:.0} MiB stored for {:.0}; ",
            *stored_bytes as f64 / MIB,
            *new_bytes as f64 / MIB
        );
        // Into a string it does not fail.
        let _ =
            write!(text, "answers {:.0} ms after the resume", self.answered.as_secs_f64() * 1e3);
        text
    }
}

fn rows(name: &str, sleeps: &[Sleep]) -> anyhow::Result<Vec<Row>> {
    let of = |value: &dyn Fn(&Sleep) -> f64| {
        Samples::new(sleeps.iter().map(value)).context("a measured value is not a number")
    };
    let durable = of(&|sleep| sleep.suspended.total_ms / 1e3)?;
    let paused = of(&|sleep| sleep.suspended.paused_ms / 1e3)?;
    let stored = of(&|sleep| sleep.suspended.stored_bytes as f64 / MIB)?.median();
    let answered = of(&|sleep| sleep.answered.as_secs_f64())?;
    let (most, soon) = (Some(Target::AtMost(SUSPEND)), Some(Target::AtMost(RESUME)));
    let mut rows = spread(&format!("handover.suspend.{name}.durable"), "s", &durable, most, None);
    rows.extend(spread(&format!("handover.suspend.{name}.paused"), "s", &paused, None, None));
    let bar = format!("handover.suspend.{name}.stored.median");
    rows.push(Row::judged(&bar, stored.context("no sleep")?, "MiB", None, None));
    let bar = format!("handover.resume.{name}.first-answer");
    rows.extend(spread(&bar, "s", &answered, soon, None));
    let wrong = sleeps.iter().map(|sleep| sleep.wrong).sum();
    rows.push(none_of(&format!("handover.resume.{name}.wrong-values"), wrong));
    Ok(rows)
}

pub(super) fn sleep(setting: &mut Setting) -> anyhow::Result<Vec<Row>> {
    let mut site = Site::new(setting)?;
    let (mut first, mut again) = (Vec::new(), Vec::new());
    for number in 0..if setting.quick { 2 } else { MACHINES } {
        setting.abandon.check()?;
        let spec = Site::spec(setting, number);
        let to = SocketAddr::from((PUBLIC, PORT + number as u16));
        let at = site.fleet.run(0, &spec)?;
        site.fleet.runner(at).wait_ready(BOOT)?;
        let seed = 2 * number as u64;
        site.fill(to, seed)?;
        let (at, sleep) = site.sleep(at, 1, &spec, to, seed)?;
        first.push(sleep);
        site.fill(to, seed + 1)?;
        let (at, sleep) = site.sleep(at, 0, &spec, to, seed + 1)?;
        again.push(sleep);
        site.retire(at);
    }
    let mut all = rows("first", &first)?;
    all.extend(rows("again", &again)?);
    Ok(all)
}
