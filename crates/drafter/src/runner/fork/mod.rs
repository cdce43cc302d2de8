//! Copies of a running machine on the same host. This is the machine's side: an image of one instant,
//! kept for as long as whoever asked for it is connected. [`copy`] is how a runner begins with one.
//!
//! ```text
//!   command ──Fork──▶ memory is copied in rounds ─ pause (milliseconds): last pages, state, disks freeze
//!                       └ the machine goes on            │
//!                                                        ▼
//!          ◀──report──  memory: a sealed memfd, disks: a layer each, in STATE/forks/ID
//!   command starts the copies' runners; each opens the memfd and links the layers
//!   command hangs up ─ the folder goes; memory and layers stay with the copies that have them
//! ```
//!
//! What must hold:
//! - The machine itself keeps its memory, disks, lease, backups and protection as they are: an image is
//!   taken the way a backup takes one, and a fork that fails at any point costs it a pause at most.
//! - Memory, disks and device state of an image are of one instant.
//! - Nobody writes what copies share: the memory is sealed, a layer is opened to be read.
//! - A copy's disks are NBD, whatever the machine's are: nobody but its monitor reaches its memory, so
//!   no server of a vhost-user disk can (decision 15).
//! - A copy has a lease and a name of its own, and nothing that it sends leaves this host before its
//!   agent has taken the new identity.

mod copy;

use super::{Runner, State, api::ForkReport, backup::Watched, hosted::fail, state::FORKS};
use crate::{
    checkpoint::capture::{self, MachineCapture},
    driver::{HostFacts, qemu},
    migrate::source::MachineError,
};
use silo::{
    block::BlockSet,
    device::Device as _,
    disk::{Disk, Layer},
    mapped::staging::StagingOptions,
    memory::seal_content,
    store::capture::CaptureError,
};
use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

/// The file in an image's folder that says what the machine is.
const MACHINE: &str = "machine";
/// How long another reader of the disks (a backup that stores its generation) is waited for.
const PATIENCE: Duration = Duration::from_secs(20);
/// Most threads that copy a machine's memory: more are not faster than the memory is.
const COPY_THREADS: usize = 4;
/// How long until it is tried again.
const AGAIN: Duration = Duration::from_millis(20);

/// What copies begin with. Dropping it removes the folder.
pub(super) struct Image {
    memory: File,
    folder: PathBuf,
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(%error, "{} could not be removed", self.folder.display());
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A name that nobody else has.
fn random_name() -> Result<String, String> {
    getrandom::u64().map(|number| format!("{number:016x}")).map_err(text)
}

/// What of a running machine an image is made of.
struct Parts {
    capture: MachineCapture,
    disks: Vec<Arc<Disk>>,
    report: ForkReport,
}

impl Runner {
    /// Takes an image of the machine, which runs on.
    pub(super) fn fork(self: &Arc<Self>) -> Result<(ForkReport, Image), String> {
        let began = Instant::now();
        let deadline = began + PATIENCE;
        let runs_on = |error: String| format!("no image was taken: {error}; the machine runs on");
        // The driver that a copy would run under.
        let driver = qemu::installed(&self.config.qemu());
        let driver = driver.map_err(|error| runs_on(text(error)))?;
        let facts = self.driver.facts().map_err(|error| runs_on(text(error)))?;
        if driver != facts.driver {
            // Saved state belongs to one version.
            return Err(runs_on(format!(
                "the machine runs under {}, and {driver} is installed now; move it to a host with its \
                 version, or start it anew from its disks",
                facts.driver
            )));
        }
        let (frozen, parts) = loop {
            let parts = self.fork_parts(&facts).map_err(runs_on)?;
            let Parts { capture, disks, report } = parts;
            match capture.into_image() {
                Ok(frozen) => break (frozen, (disks, report)),
                // A backup is being stored.
                Err(CaptureError::Frozen) if Instant::now() < deadline => {
                    std::thread::park_timeout(AGAIN);
                }
                Err(error) => return Err(runs_on(text(error))),
            }
        };
        let (disks, mut report) = parts;
        let kept = self.keep_image(&frozen, &disks, &mut report);
        let image = kept.map_err(|error| runs_on(text(error)))?;
        report.pause_ms = frozen.paused.as_secs_f64() * 1e3;
        report.total_ms = began.elapsed().as_secs_f64() * 1e3;
        tracing::info!(
            machine = %self.name.as_str(),
            pause_ms = report.pause_ms,
            total_ms = report.total_ms,
            "an image was taken to be copied"
        );
        Ok((report, image))
    }

    fn fork_parts(self: &Arc<Self>, facts: &HostFacts) -> Result<Parts, String> {
        let inner = self.settled();
        let body = inner.body.as_ref().filter(|_| inner.state == State::Running);
        let body = body.ok_or_else(|| {
            format!("it is {} here; only one that runs can be copied", inner.state.word())
        })?;
        let missing: u64 = body.content.devices().iter().map(|d| d.missing_blocks()).sum();
        if missing > 0 {
            return Err(format!("{missing} blocks have not arrived here yet; try again later"));
        }
        let report = ForkReport {
            machine: self.config.machine.clone(),
            folder: PathBuf::new(),
            memory: PathBuf::new(),
            package: body.package.dir().to_owned(),
            network: body.net.clone(),
            facts: facts.clone(),
            config: self.config.clone(),
            pause_ms: 0.0,
            total_ms: 0.0,
            memory_bytes: 0,
            disk_bytes: 0,
        };
        let (memory, copies) = (Arc::clone(&body.content.memory), body.copies.clone());
        let disks = body.content.disks.clone();
        drop(inner);
        let machine = Arc::new(Watched { runner: Arc::downgrade(self), for_store: false });
        // The command waits for it, and the guest stands still for the last of it only.
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(COPY_THREADS));
        let options = StagingOptions { threads, ..StagingOptions::default() };
        let capture = MachineCapture::new(machine, &memory, copies, options);
        Ok(Parts { capture: capture.map_err(text)?, disks, report })
    }

    /// Removes images of runners of this machine that are gone.
    fn sweep_images(&self) {
        let Ok(entries) = fs::read_dir(self.config.state.join(FORKS)) else { return };
        let (machine, me) = (self.name.as_str(), std::process::id().to_string());
        for entry in entries.flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            // No machine's name has a dot in it.
            let mut parts = name.split('.');
            if parts.next() == Some(machine) && parts.next().is_some_and(|pid| pid != me) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Puts what was frozen where the copies find it.
    fn keep_image(
        &self,
        frozen: &capture::Image,
        disks: &[Arc<Disk>],
        report: &mut ForkReport,
    ) -> Result<Image, MachineError> {
        seal_content(&frozen.memory)?;
        self.sweep_images();
        let mine = format!("{}.{}.{}", self.name.as_str(), std::process::id(), random_name()?);
        let folder = self.config.state.join(FORKS).join(mine);
        fs::create_dir_all(&folder)
            .map_err(|error| fail(format!("making {}: {error}", folder.display())))?;
        let image = Image { memory: frozen.memory.try_clone()?, folder };
        fs::write(image.folder.join(MACHINE), &frozen.machine)?;
        for (at, disk) in disks.iter().enumerate() {
            // As of now: a block that was written since the instant is listed, with its old content.
            let blocks: BlockSet = disk.allocated()?;
            report.disk_bytes += blocks.bytes();
            Layer::write(&image.folder, disk.name().as_str(), &blocks, |range, buf| {
                frozen.read_disk(at, range, buf)
            })?;
        }
        report.folder.clone_from(&image.folder);
        let (pid, number) = (std::process::id(), image.memory.as_raw_fd());
        report.memory = format!("/proc/{pid}/fd/{number}").into();
        report.memory_bytes = image.memory.metadata()?.blocks() * 512;
        Ok(image)
    }
}
