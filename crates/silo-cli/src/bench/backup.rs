//! Backup and restore, against an S3 server in this process (`s3s-fs` behind hyper, on the loopback,
//! over a folder of the scratch disk). Device content is random, restored content is compared.

use super::{Group, Setting};
use anyhow::{Context, ensure};
use bench::{Row, Samples, Target};
use silo_block::io::BlockDevice;
use silo_store::{
    Access, CopyGroup, Environment, Generation, GenerationDevice, KeyRing, Limits, LineName,
    LineWriter, RestoreOptions, ScratchOptions, Store, StoreUrl, Stored, Which, WriterOptions,
    capture::{Capture, Want},
};
use silo_testing::S3Server;
use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

pub(super) const GROUPS: &[Group] = &[
    Group {
        name: "backup",
        about: "generations of a device that is being written: their bytes, requests, and who waits",
        bars: &["silo.backup.one-percent", "silo.backup.held", "silo.backup.requests"],
        run: generations,
    },
    Group {
        name: "backup of 4 GiB",
        about: "memory while all of it is stored, and what the first block takes",
        bars: &["silo.backup.memory", "silo.backup.first-block"],
        run: first_block,
    },
    Group {
        name: "restore",
        about: "a whole device of random bytes, beside plain GETs of the same objects",
        bars: &["silo.backup.restore"],
        run: restore,
    },
];

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// A disk in memory that many threads write at once: a lock for each MiB.
struct Disk {
    parts: Vec<Mutex<Vec<u8>>>,
    size: u64,
}

impl Disk {
    fn new(size: usize, fill: impl Fn(u64, &mut [u8])) -> Arc<Self> {
        let part = |number: usize| {
            let mut bytes = vec![0; MIB.min(size - number * MIB)];
            fill(number as u64, &mut bytes);
            Mutex::new(bytes)
        };
        Arc::new(Self { parts: (0..size.div_ceil(MIB)).map(part).collect(), size: size as u64 })
    }

    fn random(size: usize, seed: u64) -> Arc<Self> {
        Self::new(size, |number, bytes| noise(seed << 32 | number, bytes))
    }

    /// Calls `each` with the pieces of a range: the part, and where in it.
    fn pieces(&self, offset: u64, length: usize, mut each: impl FnMut(&mut [u8], usize)) {
        let mut done = 0;
        while done < length {
            let at = offset as usize + done;
            let (number, from) = (at / MIB, at % MIB);
            let count = (MIB - from).min(length - done);
            let mut part =
                self.parts[number].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            each(&mut part[from..from + count], done);
            done += count;
        }
    }

    fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        self.pieces(0, self.size as usize, |part, _| _ = hasher.update(part));
        hasher.finalize()
    }
}

impl BlockDevice for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let length = buf.len();
        self.pieces(offset, length, |part, at| buf[at..at + part.len()].copy_from_slice(part));
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pieces(offset, data.len(), |part, at| {
            part.copy_from_slice(&data[at..at + part.len()]);
        });
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.pieces(offset, length as usize, |part, _| part.fill(0));
        Ok(())
    }
}

fn noise(seed: u64, bytes: &mut [u8]) {
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(bytes);
}

struct Bench {
    server: S3Server,
    keys: KeyRing,
    line: LineName,
}

impl Bench {
    fn new(scratch: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            server: S3Server::start(scratch)?,
            keys: KeyRing::from_keys([("bench", [7; 32])])?,
            line: LineName::new("bench", "disk")?,
        })
    }

    fn store(&self, access: Access) -> anyhow::Result<Arc<Store>> {
        let url: StoreUrl = self.server.url("store").parse()?;
        let environment = Environment::given(self.server.credentials());
        Ok(Store::open(&url, access, &environment, Limits::default())?)
    }

    fn writer(&self) -> anyhow::Result<LineWriter> {
        let store = self.store(Access::Write)?;
        Ok(LineWriter::open(store, &self.keys, &self.line, WriterOptions::default())?)
    }

    fn generation(&self, store: &Arc<Store>) -> anyhow::Result<Arc<Generation>> {
        Ok(Generation::open(store, &self.keys, &self.line, Which::Newest, 32 << 20)?)
    }
}

fn group(disk: Arc<dyn BlockDevice>, scratch: &Path) -> anyhow::Result<Arc<CopyGroup>> {
    let devices = vec![("disk".to_owned(), BLOCK as u32, disk)];
    Ok(CopyGroup::new(devices, ScratchOptions::in_folder(scratch))?)
}

fn round(writer: &mut LineWriter, group: &Arc<CopyGroup>) -> anyhow::Result<Stored> {
    let everything = writer.needs_everything();
    let want = if everything { Want::Everything } else { Want::Changed };
    let frozen = group.freeze(want)?;
    let stop = AtomicBool::new(false);
    let stored = writer.store(&group.devices(), frozen.as_ref(), everything, "", &stop)?;
    frozen.release();
    Ok(stored)
}

fn median(samples: impl IntoIterator<Item = f64>) -> f64 {
    Samples::new(samples).and_then(|samples| samples.median()).unwrap_or(f64::NAN)
}

/// 1 % of the blocks rewritten at random places between generations; writers go on meanwhile.
fn generations(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let size = if setting.quick { 128 * MIB } else { 1024 * MIB };
    let bench = Bench::new(&setting.scratch)?;
    let disk = Disk::random(size, 1);
    let group = group(disk.clone(), &setting.scratch)?;
    let (device, mut writer) = (group.device(0), bench.writer()?);
    round(&mut writer, &group)?;
    let (blocks, mut at) = ((size / BLOCK) as u64, 1u64);
    let mut random = move || {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (at >> 33) % blocks
    };
    let (mut bytes, mut requests) = (Vec::new(), Vec::new());
    let mut buf = vec![0; BLOCK];
    for generation in 0..7u64 {
        let mut chosen = std::collections::BTreeSet::new();
        while (chosen.len() as u64) < blocks / 100 {
            chosen.insert(random());
        }
        for block in chosen {
            noise(generation << 40 | block, &mut buf);
            device.write_at(block * BLOCK as u64, &buf)?;
        }
        let stored = round(&mut writer, &group)?;
        ensure!(stored.blocks == blocks / 100, "{} blocks were listed", stored.blocks);
        bytes.push(stored.bytes() as f64 * 100.0 / size as f64);
        requests.push(stored.requests.total() as f64);
    }
    // Checked before the writers below change it again.
    let target = Disk::random(size, 2);
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let reading = bench.store(Access::Read)?;
    let generation = bench.generation(&reading)?;
    generation.restore("disk", target.as_ref(), RestoreOptions::default(), &done, &stop)?;
    ensure!(target.hash() == disk.hash(), "what was restored differs from what was stored");

    // Two threads that write as fast as they can, one small blocks and one large, and rounds.
    let mut held = Vec::new();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        let _stop = StopAtEnd(&stop);
        for length in [BLOCK, 64 * BLOCK] {
            let (device, stop) = (&device, &stop);
            scope.spawn(move || {
                let (mut at, data) = (length as u64, vec![3; length]);
                while !stop.load(Ordering::Relaxed) {
                    at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(12345);
                    let place = (at >> 20) % (size / length) as u64 * length as u64;
                    // The disk is in memory: writing cannot fail.
                    let _ = device.write_at(place, &data);
                    std::thread::yield_now();
                }
            });
        }
        for _ in 0..5 {
            // A twentieth of the device to store, and writers that overwrite it meanwhile.
            while group.changes(0).blocks < blocks / 20 {
                std::thread::yield_now();
            }
            held.push(round(&mut writer, &group)?.held.as_secs_f64() * 1e3);
        }
        Ok(())
    })?;
    let most = held.iter().copied().fold(0.0, f64::max);
    println!("   longest hold of a writer by round, in ms: {held:.3?}");
    Ok(vec![
        Row::judged("silo.backup.one-percent", median(bytes), "%", None, Some(Target::AtMost(1.1))),
        Row::judged("silo.backup.requests", median(requests), "requests", None, None),
        Row::judged("silo.backup.held", median(held), "ms", None, Some(Target::AtMost(5.0))),
        Row::judged("silo.backup.held.longest", most, "ms", None, None),
    ])
}

struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A disk that takes no memory: every block differs from every other, and compresses.
struct Counting(u64);

impl BlockDevice for Counting {
    fn size(&self) -> u64 {
        self.0
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, word) in buf.chunks_mut(8).enumerate() {
            let at = offset + at as u64 * 8;
            let value = if at.is_multiple_of(BLOCK as u64) { at | 1 } else { at / BLOCK as u64 };
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
}

/// A line of /proc/self/status, in bytes.
fn memory(line: &str) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let value = status.lines().find_map(|text| text.strip_prefix(line)).context("no such line")?;
    let kib = value.trim_start_matches(':').trim().trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? * 1024)
}

fn first_block(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    const SIZE: u64 = 4 << 30;
    let bench = Bench::new(&setting.scratch)?;
    let group = group(Arc::new(Counting(SIZE)), &setting.scratch)?;
    let mut writer = bench.writer()?;
    // Writing 5 there sets the highest mark back to what is used now.
    std::fs::write("/proc/self/clear_refs", "5")?;
    let before = memory("VmRSS")?;
    let stored = round(&mut writer, &group)?;
    ensure!(stored.blocks == SIZE / BLOCK as u64 && stored.zeros == 0, "{stored:?}");
    let grown = memory("VmHWM")?.saturating_sub(before) as f64 / MIB as f64;
    let options = WriterOptions::default();
    let packs = options.packs.target * (options.packs.in_flight + 1);
    let allowed = (options.names + packs) as f64 / MIB as f64 + SIZE as f64 * 0.004 / MIB as f64;

    let (mut requests, mut latency) = (Vec::new(), Vec::new());
    let mut expected = vec![0; BLOCK];
    for number in 0..setting.times(20) as u64 {
        let place = (number * 7919 * 104_729) % (SIZE / BLOCK as u64) * BLOCK as u64;
        let store = bench.store(Access::Read)?;
        let begun = Instant::now();
        let generation = bench.generation(&store)?;
        let device = GenerationDevice::new(&generation, "disk", 0)?;
        let mut block = vec![0; BLOCK];
        device.read_at(place, &mut block)?;
        latency.push(begun.elapsed().as_secs_f64() * 1e3);
        requests.push(store.requests().total() as f64);
        Counting(SIZE).read_at(place, &mut expected)?;
        ensure!(block == expected, "block at {place} differs");
    }
    let most = requests.iter().copied().fold(0.0, f64::max);
    let (bar, target) = ("silo.backup.first-block.requests", Some(Target::AtMost(5.0)));
    Ok(vec![
        Row::judged("silo.backup.memory", grown, "MiB", None, Some(Target::AtMost(allowed))),
        Row::judged(bar, most, "requests", None, target),
        Row::judged("silo.backup.first-block.time", median(latency), "ms", None, None),
    ])
}

fn restore(setting: &Setting) -> anyhow::Result<Vec<Row>> {
    let size = if setting.quick { 256 * MIB } else { 1024 * MIB };
    let bench = Bench::new(&setting.scratch)?;
    let disk = Disk::random(size, 1);
    round(&mut bench.writer()?, &group(disk.clone(), &setting.scratch)?)?;
    // Its memory touched beforehand.
    let target = Disk::random(size, 2);
    let packs = packs(&bench.server.file("store/packs"))?;
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    for turn in 0..setting.times(7).max(3) {
        target.write_at(0, &vec![turn as u8; MIB])?;
        let store = bench.store(Access::Read)?;
        let generation = bench.generation(&store)?;
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let options = RestoreOptions::default();
        let restored = generation.restore("disk", target.as_ref(), options, &done, &stop)?;
        ours.push(size as f64 / restored.took.as_secs_f64() / 1e9);
        ensure!(target.hash() == disk.hash(), "what was restored differs from what was stored");
        plain.push(plain_gets(&bench, &packs)? / 1e9);
    }
    let (bar, target) = ("silo.backup.restore", Some(Target::AtLeast(0.5)));
    Ok(vec![Row::judged(bar, median(ours), "GB/s", Some(median(plain)), target)])
}

/// Names of all packs.
fn packs(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for part in std::fs::read_dir(folder)? {
        for file in std::fs::read_dir(part?.path())? {
            let path = file?.path();
            let mut ends = path.iter().rev().filter_map(|part| part.to_str());
            let (name, part) = (ends.next().context("no name")?, ends.next().context("no folder")?);
            names.push(format!("store/packs/{part}/{name}"));
        }
    }
    Ok(names)
}

/// The same objects by the same client with as many requests under way, their bytes thrown away;
/// gives bytes per second.
fn plain_gets(bench: &Bench, packs: &[String]) -> anyhow::Result<f64> {
    use futures::{StreamExt, TryStreamExt};
    use object_store::{ObjectStore, ObjectStoreExt, aws::AmazonS3Builder, path::Path};
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(S3Server::BUCKET)
        .with_region("us-east-1")
        .with_endpoint(bench.server.endpoint())
        .with_allow_http(true);
    for (name, value) in bench.server.credentials() {
        builder = builder.with_config(name.to_ascii_lowercase().parse()?, value);
    }
    let store: Arc<dyn ObjectStore> = Arc::new(builder.build()?);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let begun = Instant::now();
    let bytes = runtime.block_on(async {
        let gets = packs.iter().map(|name| {
            let (store, path) = (store.clone(), Path::from(name.as_str()));
            async move {
                tokio::spawn(async move {
                    let mut stream = store.get(&path).await?.into_stream();
                    let mut bytes = 0;
                    while let Some(part) = stream.next().await {
                        bytes += part?.len() as u64;
                    }
                    anyhow::Ok(bytes)
                })
                .await?
            }
        });
        let options = RestoreOptions::default();
        let all = futures::stream::iter(gets).buffer_unordered(options.threads * options.in_flight);
        all.try_fold(0, |sum, bytes| async move { Ok(sum + bytes) }).await
    })?;
    Ok(bytes as f64 / begun.elapsed().as_secs_f64())
}
