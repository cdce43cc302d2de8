//! A machine from a generation in a store: on this host or another than it was backed up on.
//!
//! ```text
//!   open the generation ─ can this host take it? may it? ─ memory, disks ─ load ─ lease ─ run
//! ```
//!
//! What must hold: nothing that this host has of the machine is lost if that comes to nothing; and
//! the machine's lease is taken before its first instruction, as `saved` says.

use super::{
    Runner, State,
    config::{Address, CopyOf, CopyWanted, RestoreFrom},
    hosted::{self, Content},
    saved::{As, Claim, Early, Elsewhere},
    sleep::beginning,
};
use crate::{
    checkpoint::{
        MACHINE, MEMORY,
        description::{self, Description},
        fill::StoreFill,
        restore::{DiskTarget, MemoryTarget},
    },
    driver::qemu,
    lease::{Epoch, Record},
    migrate::switchover::FlipEpoch,
};
use conduit::{AgentDataPath, MachineNet};
use identity::HostName;
use silo::{
    block::BlockSet,
    device::Device,
    disk::Disk,
    io::BlockDevice,
    store::{
        Access, Environment, Generation, GenerationDevice, KeyRing, Limits, LineName,
        RestoreOptions, Store, StoreUrl, Which,
    },
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Memory for what is read of a generation.
pub(super) const CACHE: usize = 64 << 20;
/// The variable with the keys themselves, as silo has it.
const KEYS: &str = "SILO_KEYS";
/// How often it is told how far a restore is.
const TELL: Duration = Duration::from_millis(500);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The history that generations are in.
pub(super) struct History {
    store: Arc<Store>,
    keys: KeyRing,
    line: LineName,
}

impl History {
    /// As the command's flags say.
    fn of(from: &RestoreFrom) -> Result<Self, String> {
        Self::at(&from.store, &from.line, from.keys.as_deref())
    }

    /// That of a line in a store; the keys are in a file, or else in the environment.
    pub(super) fn at(store: &str, line: &str, keys: Option<&Path>) -> Result<Self, String> {
        let url: StoreUrl = store.parse().map_err(text)?;
        let line = LineName::parse(line).map_err(text)?;
        let keys = match keys {
            Some(path) => KeyRing::from_file(path),
            None => KeyRing::from_env(KEYS),
        };
        let environment = Environment::of_process();
        let store =
            Store::open(&url, Access::Read, &environment, Limits::default()).map_err(text)?;
        Ok(Self { store, keys: keys.map_err(text)?, line })
    }

    pub(super) fn open(&self, which: Which) -> Result<Arc<Generation>, String> {
        Generation::open(&self.store, &self.keys, &self.line, which, CACHE).map_err(text)
    }

    /// The newest generation but `than`, if that is an older one.
    fn newer(&self, than: &Generation) -> Result<Option<Arc<Generation>>, String> {
        let newest = self.open(Which::Newest)?;
        Ok((newest.number() > than.number()).then_some(newest))
    }
}

/// What a generation says that the machine is, and the driver's state.
pub(super) fn described(generation: &Arc<Generation>) -> Result<(Description, Vec<u8>), String> {
    let of = |error: String| {
        format!("generation {} of {}: {error}", generation.number(), generation.line())
    };
    let device = GenerationDevice::new(generation, MACHINE, 0)
        .map_err(|error| of(format!("it is no machine's: {error}")))?;
    description::decode(&device).map_err(|error| of(text(error)))
}

/// The record under which the machine was suspended as this, if it was.
fn asleep(saved: &Description) -> Option<Record> {
    saved.suspended.then(|| Record::decode(saved.lease.as_bytes()).ok()).flatten()
}

impl Runner {
    /// Restores the machine and runs it.
    pub(super) fn restore(self: &Arc<Self>, from: &RestoreFrom) -> Result<(), String> {
        if let Some(pid) = qemu::monitor_without_runner(&self.dir.run()) {
            return Err(format!(
                "its monitor runs on this host without a runner (process {pid}): take it over with \
                 `drafter run --take-over`, or end it with `drafter stop`"
            ));
        }
        let began = Instant::now();
        let take_from = from.take_from.as_deref().map(HostName::new).transpose().map_err(text)?;
        // Looks at this host, meanwhile.
        let driver = Arc::clone(&self.driver);
        let asking = std::thread::Builder::new().name("facts".into());
        let _ = asking.spawn(move || driver.facts().map(drop));
        let history = History::of(from)?;
        let generation = history.open(from.generation.map_or(Which::Newest, Which::Number))?;
        let number = generation.number();
        let of = |error: String| format!("generation {number} of {}: {error}", from.line);
        let (saved, state) = described(&generation)?;
        if from.suspended && !saved.suspended {
            return Err(
                of("the machine ran on after it; `drafter restore` goes back to it".into()),
            );
        }
        let machine = from.copy.as_ref().map_or(&self.config.machine, |copy| &copy.of);
        let (package, lease) = self.check_saved(&saved, machine).map_err(of)?;
        if let Some(host) = from.slept_at.as_deref().filter(|host| lease.owner.as_str() != *host) {
            return Err(of(format!(
                "it was put to sleep at host \"{}\", and \"{host}\" asks for it",
                lease.owner
            )));
        }
        let copy = match &from.copy {
            Some(wanted) => Some(self.who_a_copy_is(wanted, saved.network.as_ref())?),
            None => None,
        };
        // Whoever names a generation may go back.
        let newer = match (from.generation, &copy) {
            (Some(_), None) => history.newer(&generation)?,
            _ => None,
        };
        let newest = match &newer {
            Some(newer) => asleep(&described(newer)?.0),
            None => asleep(&saved),
        };
        let claim = match from.suspended {
            true => Claim::Asleep(&lease),
            false => Claim::Restored {
                made_under: &lease,
                take_from: take_from.as_ref(),
                asleep: newest.as_ref(),
            },
        };
        tracing::info!(took = ?began.elapsed(), number, "its generation is open");
        let what = match &copy {
            Some(copy) => As::Copy(copy),
            None => {
                // Now rather than after the download.
                self.may_claim(claim)?;
                As::Itself(claim)
            }
        };

        let aside = Aside::put(&self.dir.disks(), &self.dir.root().join("disks.replaced"))
            .map_err(|error| format!("putting this host's disks of it aside: {error}"))?;
        self.make_its_tap(saved.network.as_ref(), what);
        let paths = self.site();
        let restored = hosted::new_content(&saved.shape, &package, &paths.disks, false)
            .map_err(text)
            .and_then(|content| {
                if !from.lazy {
                    self.fetch(&generation, &content, &saved).map_err(of)?;
                    return self.start_saved(saved, package, content, &state, what, None);
                }
                let elsewhere = Self::leave(&generation, &content, &saved).map_err(of)?;
                let fill = Arc::clone(&elsewhere.fill);
                let started =
                    self.start_saved(saved, package, content, &state, what, Some(elsewhere));
                // Its threads look after the machine, if there is one.
                started.inspect_err(|_| fill.end())
            });
        match restored {
            Ok(()) => {
                aside.keep();
                tracing::info!(machine = %self.name.as_str(), number, "restored");
                if let Some(newer) = newer {
                    self.say_what_is_forgotten(&generation, &newer);
                }
                Ok(())
            }
            Err(why) => {
                aside.put_back();
                // A copy is expected under no epoch yet.
                let epoch = if copy.is_some() { Epoch(0) } else { lease.epoch };
                self.path.unmake_tap(FlipEpoch::of(epoch, u16::MAX).0);
                Err(why)
            }
        }
    }

    /// The identity of a copy that is asked for, of a machine with this network.
    fn who_a_copy_is(
        &self,
        wanted: &CopyWanted,
        network: Option<&MachineNet>,
    ) -> Result<CopyOf, String> {
        let name = &self.config.machine;
        let any = match fs::read_dir(self.dir.disks()) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(text(error)),
        };
        if any {
            return Err(format!(
                "this host has a machine \"{name}\" already: `drafter remove {name}`, or choose another \
                 name"
            ));
        }
        let (address, given_v6) = match (network, wanted.address) {
            (None, None) => (None, None),
            (None, Some(_)) => {
                return Err(format!("\"{}\" has no network, and its copies have none", wanted.of));
            }
            (Some(_), None) => {
                return Err(format!(
                    "\"{}\" has a network, and a copy needs an address of its own: --address ADDRESS, \
                     or auto",
                    wanted.of
                ));
            }
            (Some(_), Some(Address::Own(address))) => (Some(address), None),
            (Some(network), Some(Address::Auto)) => {
                let agent = self.config.network.agent().ok_or(
                    "--address auto needs an edge: use --network agent, or give an address",
                )?;
                let agent = AgentDataPath::connect(agent).map_err(|error| {
                    format!("asking the network agent at {}: {error}", agent.display())
                })?;
                let (address, v6) = agent.address(name, network.network).map_err(text)?;
                (Some(address), v6)
            }
        };
        let address_v6 = wanted.address_v6.or(given_v6);
        Ok(CopyOf { copy_of: wanted.of.clone(), address, address_v6 })
    }

    /// It went back.
    fn say_what_is_forgotten(&self, to: &Generation, newest: &Generation) {
        let time = newest.made().duration_since(to.made()).unwrap_or_default();
        let said = format!(
            "it went back to generation {}: what it did in the {} s until generation {} and after it is \
             forgotten here; those generations stay in {}",
            to.number(),
            time.as_secs(),
            newest.number(),
            to.line(),
        );
        tracing::warn!("{said}");
        let mut inner = self.lock();
        if inner.detail.is_empty() {
            inner.detail = said;
        }
    }

    /// Leaves memory and disks in the store, to be brought while the machine runs. What the generation
    /// has as zeros is made so now.
    fn leave(
        generation: &Arc<Generation>,
        content: &Content,
        saved: &Description,
    ) -> Result<Elsewhere, String> {
        let mut devices: Vec<(String, Arc<dyn Device>)> =
            vec![(MEMORY.to_owned(), content.memory.clone())];
        for disk in &content.disks {
            devices.push((saved.disk_device(disk.name().as_str()), disk.clone()));
        }
        let touches = saved.first_touches();
        let fill = StoreFill::new(Arc::clone(generation), devices, &touches).map_err(text)?;
        let mut missing = Vec::new();
        for at in 0..=content.disks.len() {
            let data = fill.missing(at).map_err(text)?;
            if let Some(disk) = at.checked_sub(1).map(|at| &content.disks[at]) {
                zero_the_rest(disk, &data, saved)?;
            }
            missing.push(data);
        }
        let no_thread = |error| format!("no threads to bring it: {error}");
        fill.serve().map_err(no_thread)?;
        let early = early(generation, content, saved, &missing[0]).map_err(no_thread)?;
        Ok(Elsewhere { fill, missing, early })
    }

    /// Brings memory and disks.
    fn fetch(
        &self,
        generation: &Generation,
        content: &Content,
        saved: &Description,
    ) -> Result<(), String> {
        generation.pin_if_possible().map_err(text)?;
        let memory = MemoryTarget(Arc::clone(&content.memory));
        self.fetch_device(generation, MEMORY, &memory)?;
        for disk in &content.disks {
            let name = saved.disk_device(disk.name().as_str());
            self.fetch_device(generation, &name, &DiskTarget(Arc::clone(disk)))?;
            zero_the_rest(disk, &generation.data_blocks(&name).map_err(text)?, saved)?;
        }
        Ok(())
    }

    fn fetch_device(
        &self,
        generation: &Generation,
        name: &str,
        target: &dyn BlockDevice,
    ) -> Result<(), String> {
        let mut told = Instant::now();
        restore_device(generation, name, target, &mut |done| {
            if told.elapsed() >= TELL {
                told = Instant::now();
                let (done, size) = (done >> 20, target.size() >> 20);
                let detail = format!("restoring {name}: {done} of {size} MiB");
                self.set_state(State::Booting, detail);
            }
            true
        })?;
        Ok(())
    }
}

/// Restores a device of a generation. `look` is told every few milliseconds how many bytes are done, and
/// ends it by answering no: then some blocks are as they were.
pub(super) fn restore_device(
    generation: &Generation,
    name: &str,
    target: &dyn BlockDevice,
    look: &mut dyn FnMut(u64) -> bool,
) -> Result<(), String> {
    let found = generation.devices().into_iter().find(|device| device.name == name);
    let bytes = found.map_or(0, |device| device.geometry.bytes());
    if bytes != target.size() {
        return Err(format!(
            "its device \"{name}\" has {bytes} bytes, the machine's has {}",
            target.size()
        ));
    }
    // Of memory that is so, of a disk it is seen to.
    let options = RestoreOptions { target_is_zero: true, ..RestoreOptions::default() };
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let restored = std::thread::scope(|scope| {
        let work = scope.spawn(|| generation.restore(name, target, options, &done, &stop));
        while !work.is_finished() {
            std::thread::park_timeout(Duration::from_millis(5));
            if !look(done.load(Ordering::Relaxed)) {
                stop.store(true, Ordering::Relaxed);
            }
        }
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    match restored {
        Err(_) if stop.load(Ordering::Relaxed) => Ok(()),
        other => other.map(drop).map_err(text),
    }
}

/// Begins to bring what of memory will be touched first.
fn early(
    generation: &Arc<Generation>,
    content: &Content,
    saved: &Description,
    missing: &BlockSet,
) -> io::Result<Option<Early>> {
    let touches = saved.first_touches();
    let known = touches.get(MEMORY).filter(|known| known.blocks == content.memory.blocks());
    let Some(known) = known else { return Ok(None) };
    let mut blocks = BlockSet::new(content.memory.blocks());
    for range in beginning(&known.order) {
        missing.ranges_in(range).for_each(|range| blocks.insert_range(range));
    }
    let (generation, memory) = (Arc::clone(generation), Arc::clone(&content.memory));
    let only = blocks.clone();
    let bringing = std::thread::Builder::new().name("early".into()).spawn(move || {
        let (options, stop) = (RestoreOptions::default(), AtomicBool::new(false));
        let target = MemoryTarget(memory);
        generation.restore_some(MEMORY, &only, &target, options, &stop).map_err(text)
    })?;
    Ok(Some(Early { blocks, bringing }))
}

/// Makes those blocks of a new disk zeros that the generation has as such; `data` are those that it has
/// otherwise.
fn zero_the_rest(disk: &Arc<Disk>, data: &BlockSet, saved: &Description) -> Result<(), String> {
    let mut zeros = saved.held(disk.name().as_str(), disk.blocks()).map_err(text)?;
    zeros.subtract(data);
    let target = DiskTarget(Arc::clone(disk));
    for range in zeros.ranges() {
        target.zero(range.start.offset(), range.bytes(), false).map_err(text)?;
    }
    Ok(())
}

/// The disks that this host had of the machine, out of the way.
pub(super) struct Aside {
    disks: PathBuf,
    kept: Option<PathBuf>,
}

impl Aside {
    /// Puts them from `disks` to `kept`, if there are any; what was there of an earlier restore goes.
    pub(super) fn put(disks: &Path, kept: &Path) -> io::Result<Self> {
        let any = match fs::read_dir(disks) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        if any {
            if kept.exists() {
                fs::remove_dir_all(kept)?;
            }
            fs::rename(disks, kept)?;
        }
        fs::create_dir_all(disks)?;
        Ok(Self { disks: disks.to_owned(), kept: any.then(|| kept.to_owned()) })
    }

    /// The restored ones are the machine's.
    pub(super) fn keep(self) {
        if let Some(kept) = &self.kept {
            tracing::info!("the disks that this host had before are in {}", kept.display());
        }
    }

    /// The restore came to nothing.
    fn put_back(self) {
        let back = fs::remove_dir_all(&self.disks).and_then(|()| match &self.kept {
            Some(kept) => fs::rename(kept, &self.disks),
            None => Ok(()),
        });
        if let Err(error) = back {
            tracing::error!(%error, "this host's disks of the machine could not be put back");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_that_were_here_come_back_after_a_restore_that_failed_and_stay_aside_after_one_that_did_not()
     {
        let folder = tempfile::tempdir().unwrap();
        let (disks, kept) = (folder.path().join("disks"), folder.path().join("kept"));
        let content = |path: &Path| fs::read_to_string(path.join("root")).ok();
        fs::create_dir(&disks).unwrap();
        fs::write(disks.join("root"), "old").unwrap();
        let aside = Aside::put(&disks, &kept).unwrap();
        assert_eq!((content(&disks), content(&kept)), (None, Some("old".into())));
        fs::write(disks.join("root"), "half").unwrap();
        aside.put_back();
        assert_eq!((content(&disks), content(&kept)), (Some("old".into()), None));

        for new in ["new", "newer"] {
            let before = content(&disks);
            let aside = Aside::put(&disks, &kept).unwrap();
            fs::write(disks.join("root"), new).unwrap();
            aside.keep();
            assert_eq!((content(&disks), content(&kept)), (Some(new.into()), before));
        }
    }

    #[test]
    fn a_host_that_had_no_disks_has_none_after_a_restore_that_failed() {
        let folder = tempfile::tempdir().unwrap();
        let (disks, kept) = (folder.path().join("disks"), folder.path().join("kept"));
        let aside = Aside::put(&disks, &kept).unwrap();
        fs::write(disks.join("root"), "half").unwrap();
        aside.put_back();
        assert!(!disks.exists() && !kept.exists());
    }
}
