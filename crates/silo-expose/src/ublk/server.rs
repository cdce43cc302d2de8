//! The life of a served device: added, started, stopped; or taken over from a server that died.

use super::{
    abi::{
        ANY_DEVICE, Control, INFO_BYTES, Info, MAX_DEPTH, PARAMS_BYTES, Params, RECOVERY,
        RECOVERY_REISSUE, SECTOR, State,
    },
    queue::{Answers, Driver, Payload, Work},
    request::MAX_RANGE_SECTORS,
    sys::Kernel,
};
use crate::pool::Pool;
use silo_block::io::BlockDevice;
use std::{
    io, mem,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// How long the driver may take over what it answers from its own memory.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How long starting may take: it reads partition tables, from blocks that may have to come.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take until a dead server's device waits for the next. Kernels before 6.7 look
/// every 5 s.
const QUIESCE_LIMIT: Duration = Duration::from_secs(20);
/// How often that is looked at: the driver tells nobody.
const LOOK: Duration = Duration::from_millis(50);
/// How long the device may delete what a dead server left, or what was never started.
const DELETE_LIMIT: Duration = Duration::from_secs(10);
/// Longest time between interrupting a device and looking again.
const INTERRUPT_EVERY: Duration = Duration::from_millis(10);
/// Longest request that a device of an earlier server may have.
const MOST_REQUEST: u32 = 32 << 20;

/// How a device is served.
#[derive(Clone, Debug)]
pub struct UblkOptions {
    /// The number, as in `/dev/ublkb3`; the first free one if not given.
    pub id: Option<u32>,
    /// Queues; the kernel makes no more than it has processors.
    pub queues: u16,
    /// Requests of a queue at a time, 1 to 4096.
    pub depth: u16,
    /// Longest read or write, in bytes: so much memory is set aside for each of them.
    pub max_request: u32,
    /// Most threads for requests that wait.
    pub workers: usize,
    /// The device stays when this process dies: its users wait, and a server that starts with the
    /// same `id` goes on.
    pub recover: bool,
}

impl Default for UblkOptions {
    fn default() -> Self {
        Self { id: None, queues: 1, depth: 64, max_request: 512 << 10, workers: 32, recover: false }
    }
}

/// What a server could not do.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// The kernel has no driver.
    #[error(
        "this kernel has no ublk (/dev/ublk-control: {source}): modprobe ublk_drv (Linux 6.4 or \
         newer with CONFIG_BLK_DEV_UBLK), or use NBD, FUSE or vhost-user-blk"
    )]
    Missing {
        /// The cause.
        source: io::Error,
    },
    /// The options cannot be.
    #[error("ublk: {reason}")]
    Options {
        /// Why.
        reason: String,
    },
    /// The driver, or io_uring, refused.
    #[error("could not {operation} ublk device {device}: {source}{hint}")]
    Driver {
        /// What was attempted.
        operation: &'static str,
        /// Its number, or `(new)`.
        device: String,
        /// The cause.
        source: io::Error,
        /// What to do, if that is known.
        hint: &'static str,
    },
    /// Another server has it.
    #[error("ublk device {id} is served by process {pid}; stop it, or choose another number")]
    Taken {
        /// Its number.
        id: u32,
        /// The server.
        pid: i32,
    },
    /// The device that was left is another.
    #[error(
        "ublk device {id} was left with {old} bytes, the device to serve has {new}: serve the one \
         that it was made for, or delete it"
    )]
    Size {
        /// Its number.
        id: u32,
        /// In bytes.
        old: u64,
        /// In bytes.
        new: u64,
    },
    /// Requests did not end in time.
    #[error(
        "ublk device {id} still had requests in hand after {limit:?}; it is left in the kernel"
    )]
    Busy {
        /// Its number.
        id: u32,
        /// How long was waited.
        limit: Duration,
    },
}

/// A running server. Dropping it stops it.
pub struct UblkServer(Serving<Kernel>);

impl UblkServer {
    /// Makes `device` a block device of this kernel. Needs root, io_uring, and the kernel's driver.
    ///
    /// # Errors
    /// Says what is missing, or which step the driver refused; then nothing is left of it.
    pub fn start(device: Arc<dyn BlockDevice>, options: &UblkOptions) -> Result<Self, UblkError> {
        let driver = Kernel::open().map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => UblkError::Driver {
                operation: "make",
                device: name(options.id),
                source,
                hint: "; it needs root (CAP_SYS_ADMIN)",
            },
            _ => UblkError::Missing { source },
        })?;
        Serving::start(driver, device, options).map(Self)
    }

    /// The block device.
    #[must_use]
    pub fn node(&self) -> &Path {
        &self.0.node
    }

    /// Whether all queues are served.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.0.is_live()
    }

    /// Removes the block device: what users wrote through the kernel's cache is written first.
    /// Requests that still wait for missing blocks after half of `limit` are ended with an error.
    ///
    /// # Errors
    /// If requests are still in hand after `limit`, or the driver refuses.
    pub fn stop(mut self, limit: Duration) -> Result<(), UblkError> {
        self.0.shut(limit)
    }
}

impl Drop for UblkServer {
    fn drop(&mut self) {
        if let Err(error) = self.0.shut(Duration::from_secs(5)) {
            tracing::warn!(%error, "a ublk device did not end");
        }
    }
}

fn name(id: Option<u32>) -> String {
    id.map_or_else(|| "(new)".to_owned(), |id| id.to_string())
}

/// What a queue's thread tells.
enum News {
    /// The driver has all its entries.
    Ready,
    Ended(io::Result<()>),
}

/// A server on some driver.
pub(super) struct Serving<D: Driver> {
    driver: Arc<D>,
    device: Arc<dyn BlockDevice>,
    info: Info,
    node: PathBuf,
    queues: Vec<Arc<Answers>>,
    /// Threads of queues that have not told their end.
    running: usize,
    news: Receiver<News>,
    /// A queue has ended.
    ended: Arc<AtomicBool>,
    pool: Arc<Pool>,
    stopped: bool,
}

impl<D: Driver> Serving<D> {
    pub(super) fn start(
        driver: D,
        device: Arc<dyn BlockDevice>,
        options: &UblkOptions,
    ) -> Result<Self, UblkError> {
        check(&*device, options)?;
        let found = options.id.map_or(Ok(None), |id| find(&driver, id, options, device.size()))?;
        let taken_over = found.is_some();
        let info = match found {
            Some(info) => info,
            None => add(&driver, options)?,
        };
        let (tell, news) = channel();
        let mut serving = Self {
            driver: Arc::new(driver),
            device,
            info,
            node: format!("/dev/ublkb{}", info.id).into(),
            queues: Vec::new(),
            running: 0,
            news,
            ended: Arc::default(),
            pool: Arc::new(Pool::new(options.workers)),
            stopped: false,
        };
        let begun = serving.begin(&tell, taken_over);
        if begun.is_err() {
            serving.stopped = true;
            serving.queues.iter().for_each(|answers| answers.quit());
            let left = serving.await_queues(Instant::now() + ANSWER_LIMIT);
            serving.driver.close();
            // One that was taken over stays for the next attempt.
            let delete = !taken_over && left == 0;
            if delete && let Err(error) = serving.control(Control::Delete, 0, DELETE_LIMIT) {
                tracing::warn!(%error, "a ublk device that was not started is left");
            }
        }
        begun.map(|()| serving)
    }

    /// From an added, or a left, device to a started one.
    fn begin(&mut self, tell: &Sender<News>, taken_over: bool) -> Result<(), UblkError> {
        let id = self.info.id;
        if taken_over {
            self.take_over()?;
        } else {
            let bytes = params(&*self.device, &self.info).encode().to_vec();
            self.command(Control::SetParams, Payload { bytes, data: 0 }, ANSWER_LIMIT)?;
        }
        let opened = self.driver.open(id, ANSWER_LIMIT);
        opened.map_err(|source| failed("open the file of", Some(id), source))?;
        let unserved = |source| failed("take requests of", Some(id), source);
        for queue in 0..self.info.queues {
            self.spawn(queue, tell.clone()).map_err(unserved)?;
        }
        for _ in 0..self.info.queues {
            match self.news.recv_timeout(ANSWER_LIMIT) {
                Ok(News::Ready) => {}
                Ok(News::Ended(outcome)) => {
                    self.running -= 1;
                    return Err(unserved(outcome.err().unwrap_or(io::ErrorKind::Other.into())));
                }
                Err(_) => return Err(unserved(io::ErrorKind::TimedOut.into())),
            }
        }
        let command = if taken_over { Control::EndRecovery } else { Control::Start };
        self.control(command, process::id().into(), START_LIMIT).map(drop)
    }

    /// The dead server's file may be open for a moment longer than it lived.
    fn take_over(&self) -> Result<(), UblkError> {
        let deadline = Instant::now() + QUIESCE_LIMIT;
        loop {
            match self.control(Control::StartRecovery, 0, ANSWER_LIMIT) {
                Err(UblkError::Driver { source, .. })
                    if source.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline =>
                {
                    thread::sleep(LOOK);
                }
                outcome => return outcome.map(drop),
            }
        }
    }

    fn spawn(&mut self, queue: u16, tell: Sender<News>) -> io::Result<()> {
        let answers = Arc::new(Answers::new()?);
        let (driver, info, ended) = (self.driver.clone(), self.info, self.ended.clone());
        let work =
            Work { device: self.device.clone(), pool: self.pool.clone(), answers: answers.clone() };
        thread::Builder::new().name(format!("silo-ublk-{queue}")).spawn(move || {
            let entries = driver.entries(&info, queue, work.answers.wake());
            let outcome = entries.and_then(|mut entries| {
                work.fetch(&mut entries, &info)?;
                // Nobody asks any more if the server is gone; so below.
                let _ = tell.send(News::Ready);
                work.serve(&mut entries, &info)
            });
            if let Err(error) = &outcome {
                tracing::error!(%error, queue, "a ublk queue is not served any more");
            }
            ended.store(true, Ordering::SeqCst);
            let _ = tell.send(News::Ended(outcome));
        })?;
        self.queues.push(answers);
        self.running += 1;
        Ok(())
    }

    fn command(
        &self,
        command: Control,
        payload: Payload,
        limit: Duration,
    ) -> Result<Vec<u8>, UblkError> {
        let done = self.driver.control(command, self.info.id, payload, limit);
        done.map_err(|source| failed(command.name(), Some(self.info.id), source))
    }

    fn control(&self, command: Control, data: u64, limit: Duration) -> Result<Vec<u8>, UblkError> {
        self.command(command, Payload { bytes: Vec::new(), data }, limit)
    }

    pub(super) fn shut(&mut self, limit: Duration) -> Result<(), UblkError> {
        if mem::replace(&mut self.stopped, true) {
            return Ok(());
        }
        let (deadline, id) = (Instant::now() + limit, self.info.id);
        let stopped = self.interrupted(limit / 2, || self.control(Control::Stop, 0, limit));
        // Their entries come back with the end of the device.
        let grace = deadline.max(Instant::now() + INTERRUPT_EVERY);
        if stopped.is_err() || self.await_queues(grace) > 0 {
            self.queues.iter().for_each(|answers| answers.quit());
            self.await_queues(Instant::now() + ANSWER_LIMIT);
        }
        self.pool.stop();
        let at_work = self.running + self.pool.wait(deadline.max(grace));
        self.driver.close();
        match stopped {
            Err(UblkError::Driver { source, .. }) if source.kind() == io::ErrorKind::TimedOut => {
                Err(UblkError::Busy { id, limit })
            }
            Err(error) => Err(error),
            Ok(_) if at_work > 0 => Err(UblkError::Busy { id, limit }),
            Ok(_) => self.control(Control::Delete, 0, DELETE_LIMIT).map(drop),
        }
    }

    /// Calls `end`, which waits for requests in hand. From `patience` on those that wait for blocks
    /// are ended: again and again, as one may begin to wait just after. Not before, because what
    /// the kernel writes from its cache at the end is among them.
    fn interrupted<T>(&self, patience: Duration, end: impl FnOnce() -> T) -> T {
        let (over, watched) = channel::<()>();
        let device = &self.device;
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut wait = patience;
                while watched.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                    device.interrupt();
                    wait = INTERRUPT_EVERY;
                }
            });
            let result = end();
            drop(over);
            result
        })
    }

    /// Waits for the ends of the queues' threads; how many did not come.
    fn await_queues(&mut self, deadline: Instant) -> usize {
        while self.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.news.recv_timeout(left) {
                Ok(News::Ready) => {}
                Ok(News::Ended(_)) => self.running -= 1,
                Err(_) => break,
            }
        }
        self.running
    }

    /// Whether all queues are served.
    pub(super) fn is_live(&self) -> bool {
        !self.ended.load(Ordering::SeqCst)
    }

    /// The device's number.
    #[cfg(test)]
    pub(super) fn id(&self) -> u32 {
        self.info.id
    }
}

fn failed(operation: &'static str, id: Option<u32>, source: io::Error) -> UblkError {
    let hint = match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; it needs root (CAP_SYS_ADMIN), and io_uring",
        Some(libc::ENOSYS) => "; this kernel, or what confines this process, has no io_uring",
        Some(libc::EOPNOTSUPP) => "; it needs Linux 6.4 or newer",
        Some(libc::EEXIST) => "; the number is taken",
        _ => "",
    };
    UblkError::Driver { operation, device: name(id), source, hint }
}

fn check(device: &dyn BlockDevice, options: &UblkOptions) -> Result<(), UblkError> {
    let wrong = |reason: &str| Err(UblkError::Options { reason: reason.to_owned() });
    if device.size() < SECTOR {
        return wrong("the device is smaller than a sector of 512 bytes");
    }
    if options.queues == 0 || options.depth == 0 || options.depth > MAX_DEPTH {
        return wrong("there is at least 1 queue, of 1 to 4096 entries");
    }
    if options.max_request < 4096 || options.max_request > MOST_REQUEST {
        return wrong("the longest request is 4 KiB to 32 MiB");
    }
    if options.recover && options.id.is_none() {
        return wrong(
            "a device that is to be taken over needs a number that its next server knows",
        );
    }
    Ok(())
}

fn params(device: &dyn BlockDevice, info: &Info) -> Params {
    Params {
        read_only: device.is_read_only(),
        sectors: device.size() / SECTOR,
        max_sectors: info.max_request / SECTOR as u32,
        max_range_sectors: MAX_RANGE_SECTORS,
    }
}

fn add(driver: &impl Driver, options: &UblkOptions) -> Result<Info, UblkError> {
    let id = options.id.unwrap_or(ANY_DEVICE);
    let wanted = Info {
        queues: options.queues,
        depth: options.depth,
        state: State::Dead,
        max_request: options.max_request,
        id,
        pid: process::id().cast_signed(),
        flags: if options.recover { RECOVERY | RECOVERY_REISSUE } else { 0 },
    };
    let payload = Payload { bytes: wanted.encode().to_vec(), data: 0 };
    let added = driver.control(Control::Add, id, payload, ANSWER_LIMIT);
    let bytes = added.map_err(|source| failed(Control::Add.name(), options.id, source))?;
    let info = read_info(&bytes, options.id)?;
    if info.flags & wanted.flags != wanted.flags {
        let payload = Payload::default();
        if let Err(error) = driver.control(Control::Delete, info.id, payload, DELETE_LIMIT) {
            tracing::warn!(%error, id = info.id, "a ublk device that was not started is left");
        }
        let reason = "this kernel's driver keeps no device when its server dies".to_owned();
        return Err(UblkError::Options { reason });
    }
    Ok(info)
}

/// What the driver says of a device, if it can be.
fn read_info(bytes: &[u8], id: Option<u32>) -> Result<Info, UblkError> {
    let wrong = || {
        let source = io::Error::new(io::ErrorKind::InvalidData, "the driver's answer cannot be");
        failed(Control::GetInfo.name(), id, source)
    };
    let info = Info::decode(bytes.try_into().map_err(|_| wrong())?);
    let depths = 1..=MAX_DEPTH;
    let requests = 4096..=MOST_REQUEST;
    let fits = info.queues > 0
        && depths.contains(&info.depth)
        && requests.contains(&info.max_request)
        && id.is_none_or(|id| id == info.id);
    if fits { Ok(info) } else { Err(wrong()) }
}

/// Looks whether the number is in use. `Some`: a device that a dead server left, to be taken over.
/// What a dead server left without a disk is deleted.
fn find(
    driver: &impl Driver,
    id: u32,
    options: &UblkOptions,
    size: u64,
) -> Result<Option<Info>, UblkError> {
    let ask = |command: Control, bytes: usize| {
        let payload = Payload { bytes: vec![0; bytes], data: 0 };
        driver.control(command, id, payload, ANSWER_LIMIT)
    };
    let deadline = Instant::now() + QUIESCE_LIMIT;
    loop {
        let bytes = match ask(Control::GetInfo, INFO_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            Err(error) => return Err(failed(Control::GetInfo.name(), Some(id), error)),
        };
        let info = read_info(&bytes, Some(id))?;
        let serves = info.pid > 0 && Path::new(&format!("/proc/{}", info.pid)).exists();
        match info.state {
            State::Quiesced if options.recover => {
                let mut bytes = vec![0; PARAMS_BYTES];
                bytes[..4].copy_from_slice(&(PARAMS_BYTES as u32).to_ne_bytes());
                let payload = Payload { bytes, data: 0 };
                let read = driver.control(Control::GetParams, id, payload, ANSWER_LIMIT);
                let bytes = read.map_err(|e| failed(Control::GetParams.name(), Some(id), e))?;
                let sectors = bytes[..].try_into().map_or(0, Params::decode_sectors);
                if sectors != size / SECTOR {
                    let old = sectors.saturating_mul(SECTOR);
                    return Err(UblkError::Size { id, old, new: size });
                }
                return Ok(Some(info));
            }
            State::Quiesced => {
                let reason = format!(
                    "device {id} was left by a server that died, and its users wait: start with \
                     recovery to go on with it"
                );
                return Err(UblkError::Options { reason });
            }
            State::Dead if !serves => {
                let deleted = driver.control(Control::Delete, id, Payload::default(), DELETE_LIMIT);
                deleted.map_err(|e| failed(Control::Delete.name(), Some(id), e))?;
                return Ok(None);
            }
            // The driver has not seen yet that it died.
            State::Live if !serves && Instant::now() < deadline => thread::sleep(LOOK),
            _ => return Err(UblkError::Taken { id, pid: info.pid }),
        }
    }
}
