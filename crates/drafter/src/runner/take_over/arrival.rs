//! A machine that lacks blocks, and whose runner died while they came.
//!
//! What is missing is found where it must be: of memory every hole of the memfd (a block that was
//! filled, or that the guest has touched, is a page; a zero block that nobody has touched is a hole
//! too and is asked for once more, which costs a note); of disks what their maps say. The source's
//! content is frozen, so whatever it sends is the last that was written before the guest ran here.

use super::{ASK_AGAIN, MoveNote, Noted, text};
use crate::{
    driver::{Fence, Vm},
    lease::{AttemptId, BootTime},
    migrate::{
        again::Greeter,
        destination::{self, Continuation, Demands, Door, Fate, Freezer},
        messages::{Confirmation, DurableReport, ResumeAnswer, Standing},
        protocol::DeviceNumber,
        switchover::{DestinationParts, FlipEpoch, Holding, Terms},
    },
    package::Package,
    runner::{
        Runner, State,
        hosted::{Content, Found, Hosted},
    },
    tenure::random_nonces,
};
use identity::HostName;
use silo::{block::BlockSet, device::Device, disk::DiskStatus};
use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

impl Runner {
    pub(super) fn take_over_arrival(
        self: &Arc<Self>,
        noted: &Noted,
        by: &MoveNote,
        package: Package,
        holding: Holding,
    ) -> Result<(), String> {
        let disks = self.open_disks(&package, true)?;
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let gone = "its monitor is gone too, and blocks were missing: restore it from a generation, \
                    or boot it from a host that has its disks";
        let fence = self.driver.fence(site.run_dir).map_err(text)?.ok_or(gone)?;
        let demands = OnceLock::new();
        let arm = |content: &Content| {
            let demands = demands.get_or_init(|| Demands::new(&content.devices(), None));
            let memory = &content.memory;
            let mut missing = BlockSet::full(memory.blocks());
            missing.subtract(&memory.allocated()?);
            memory.expect(missing, demands.of(DeviceNumber(0)));
            for (at, disk) in content.disks.iter().enumerate() {
                if disk.status() != DiskStatus::Whole {
                    disk.arm(&disk.missing(), demands.of(DeviceNumber(at as u8 + 1)))?;
                }
            }
            Ok(())
        };
        let net = noted.network.as_ref();
        let found = Found::look(&noted.shape, net, disks, true, &site, arm).map_err(text)?;
        let demands = demands.into_inner().ok_or("its memory was not looked at")?;
        let servers = found.serve(&noted.shape, &site).map_err(text)?;
        let devices = found.content.devices();
        let missing: u64 = devices.iter().map(|device| device.missing_blocks()).sum();
        tracing::info!(missing, "taking over a machine that lacks blocks");
        self.lock().devices.clone_from(&devices);
        // The door first: a source that comes while there is none is told that nobody knows it.
        let door = self.open_door(by)?;
        self.set_state(State::Receiving, format!("from {}, taken over", by.peer));

        let memory = Arc::clone(&found.content.memory);
        // What it sends stays held, if it is held, until the source's flushes are durable.
        let due = Arc::new(AtomicBool::new(false));
        let continuation = Continuation {
            devices,
            demands,
            door,
            holding: holding.clone(),
            parts: DestinationParts {
                machine: self.name.clone(),
                here: self.host.clone(),
                from: HostName::new(&by.peer).map_err(text)?,
                attempt: AttemptId(by.attempt),
                beat: None,
                terms: Terms::default(),
                nonces: random_nonces(),
            },
            store: Arc::clone(&self.store),
            freezer: Arc::new(Fenced(Arc::clone(&fence))),
            faults: Box::new(move || memory.fault_summary()),
            on_history: {
                let runner = Arc::clone(self);
                Box::new(move |told| runner.history_told(told))
            },
            on_complete: {
                let (runner, settled) = (Arc::clone(self), noted.settled(Some(by.clone())));
                Box::new(move || runner.complete(&settled))
            },
            on_release: {
                let (runner, due) = (Arc::clone(self), Arc::clone(&due));
                Box::new(move || {
                    due.store(true, Ordering::SeqCst);
                    runner.release_if(&due);
                })
            },
        };
        let brought = std::thread::Builder::new().name("arrival".into()).spawn(move || {
            match destination::go_on::<Hosted>(continuation) {
                Fate::Settled(_) => tracing::info!("all of it is here"),
                fate => tracing::error!(?fate, "a machine that was taken over lacks blocks"),
            }
        });
        brought.map_err(|error| format!("no thread to bring the rest of it: {error}"))?;

        let vm = self.ask_monitor(&*fence)?;
        let mut body =
            found.adopt(package, noted.network.clone(), noted.shape.clone(), servers, vm, &site);
        if self.commits_output() {
            body.commit_output(true).map_err(text)?;
        }
        self.lead_here(&mut body, FlipEpoch::of(holding.record.epoch, 0))?;
        self.install(Box::new(body), holding, None);
        self.release_if(&due);
        Ok(())
    }

    /// Lets out what the guest has sent, if that is due and its body is here; else whoever comes last
    /// of the two does it.
    fn release_if(&self, due: &AtomicBool) {
        let mut inner = self.lock();
        if let Some(body) = inner.body.as_mut().filter(|_| due.load(Ordering::SeqCst))
            && let Err(error) = body.release()
        {
            tracing::error!(%error, "releasing held frames failed");
        }
    }

    /// Until its monitor answers: it may be waiting for a page, which comes when the source connects.
    fn ask_monitor(&self, fence: &dyn Fence) -> Result<Box<dyn Vm>, String> {
        loop {
            match self.driver.take_over(&self.dir.run()) {
                Ok(Some(vm)) => return Ok(vm),
                Ok(None) => return Err("its monitor has ended while blocks were missing".into()),
                Err(crate::driver::DriverError::Timeout { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
            if self.lock().state.over() {
                let _ = fence.kill();
                return Err("it was stopped".into());
            }
            std::thread::park_timeout(ASK_AGAIN);
        }
    }

    /// The lease is not ours by this attempt: the copy here never was anybody's.
    pub(super) fn drop_arrival(&self, by: &MoveNote) -> Result<(), String> {
        crate::driver::qemu::stop_without_runner(&self.dir.run()).map_err(text)?;
        super::forget(&self.dir);
        // Its source gets no refusal: a write to the lease that the old runner began may still be on
        // its way to the store. The source waits for the end of the offer, and asks the store.
        if self.config.listen.is_none() {
            return Err("the machine had not become this host's; its copy here was ended".into());
        }
        self.set_state(
            State::Standby,
            format!("an arrival from {} had not become this host's; its copy was ended", by.peer),
        );
        Ok(())
    }

    /// A door for the source of a move.
    pub(in crate::runner) fn open_door(&self, by: &MoveNote) -> Result<Arc<Door>, String> {
        let from = HostName::new(&by.peer).map_err(text)?;
        let machine = self.config.machine.clone();
        let door = Door::new(Greeter::new(machine, from, by.attempt, by.session.clone()));
        self.keep_door(&door);
        Ok(door)
    }

    /// A source that did not hear that all is here is told when it asks.
    pub(super) fn answer_settled(&self, by: &MoveNote, epoch: u64) {
        let Ok(door) = self.open_door(by) else { return };
        let confirmation = Confirmation {
            epoch,
            armed_us: 0,
            loaded_us: 0,
            running_us: 0,
            released_us: 0,
            running_at_ns: 0,
            early_faults: 0,
        };
        door.end(&ResumeAnswer {
            confirmation: Some(confirmation),
            durable: Some(DurableReport { epoch, faults: silo::memory::FaultSummary::default() }),
            ..ResumeAnswer::of(Standing::Durable, "")
        });
    }
}

struct Fenced(Arc<dyn Fence>);

impl Freezer for Fenced {
    fn freeze(&self) -> Result<(), String> {
        self.0.freeze().map_err(text)
    }

    fn thaw(&self) -> Result<(), String> {
        self.0.thaw().map_err(text)
    }

    fn run_until(&self, end: Option<BootTime>) -> Result<(), String> {
        // It is this host's.
        end.map_or(Ok(()), |_| Err("it runs here already".to_owned()))
    }

    fn lease_asked(&self) {}
}
