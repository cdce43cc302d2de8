//! A driver for tests, which does what `drivers/block/ublk_drv.c` does as far as a server sees it:
//! devices with their states, entries that belong to one side at a time, data copied when a
//! request is handed over and when it is answered. What a server must not do makes it panic.

use super::{
    abi::{ABORTED, ANY_DEVICE, Control, Descriptor, Info, Io, RECOVERY, State},
    queue::{Driver, Entries, Event, Payload},
    request::Operation,
    sys::Buffer,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};
use std::{
    collections::{BTreeMap, VecDeque},
    io,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(20);
/// The kernel makes no more queues than it has processors.
const PROCESSORS: u16 = 2;
/// A process that there is not.
const DEAD_PID: i32 = i32::MAX;

enum Entry {
    /// Never given.
    Server,
    Driver(Buffer),
    /// With this request.
    Busy(u64),
}

#[derive(Default)]
struct Queue {
    entries: Vec<Entry>,
    descriptors: Vec<Option<Descriptor>>,
    events: Vec<Event>,
    wake: Option<Arc<EventFd>>,
}

struct Request {
    descriptor: Descriptor,
    data: Vec<u8>,
    result: Option<i32>,
}

struct Device {
    info: Info,
    params: Option<Vec<u8>>,
    open: bool,
    /// Threads that have entries.
    threads: usize,
    killed: bool,
    queues: Vec<Queue>,
    waiting: VecDeque<u64>,
    requests: BTreeMap<u64, Request>,
}

impl Device {
    fn new(info: Info) -> Self {
        let (queues, requests) = (Vec::new(), BTreeMap::new());
        let waiting = VecDeque::new();
        let mut device = Self {
            info,
            params: None,
            open: false,
            threads: 0,
            killed: false,
            queues,
            waiting,
            requests,
        };
        device.reset();
        device
    }

    fn reset(&mut self) {
        let depth = usize::from(self.info.depth);
        self.queues = (0..self.info.queues)
            .map(|_| Queue {
                entries: (0..depth).map(|_| Entry::Server).collect(),
                descriptors: vec![None; depth],
                ..Queue::default()
            })
            .collect();
        self.killed = false;
    }

    fn all_given(&self) -> bool {
        let mut entries = self.queues.iter().flat_map(|queue| &queue.entries);
        entries.all(|entry| matches!(entry, Entry::Driver(_)))
    }

    fn idle(&self) -> bool {
        self.requests.values().all(|request| request.result.is_some())
    }

    /// Hands waiting requests over to entries that are free.
    fn dispatch(&mut self) {
        if self.info.state != State::Live || self.killed {
            return;
        }
        for queue in &mut self.queues {
            for tag in 0..queue.entries.len() {
                let Entry::Driver(_) = queue.entries[tag] else { continue };
                let Some(number) = self.waiting.pop_front() else { return };
                let taken = std::mem::replace(&mut queue.entries[tag], Entry::Busy(number));
                let Entry::Driver(mut buffer) = taken else { unreachable!() };
                let request = &self.requests[&number];
                if Operation::of(&request.descriptor) == Operation::Write {
                    buffer.as_mut()[..request.data.len()].copy_from_slice(&request.data);
                }
                queue.descriptors[tag] = Some(request.descriptor);
                queue.events.push(Event { tag: tag as u16, result: 0, buffer });
                signal(queue.wake.as_ref());
            }
        }
    }
}

fn signal(wake: Option<&Arc<EventFd>>) {
    if let Some(wake) = wake {
        wake.write(1).expect("an event is signalled");
    }
}

#[derive(Default)]
struct Known {
    devices: BTreeMap<u32, Device>,
    next: u64,
    refuses: Option<(Control, i32)>,
}

#[derive(Default)]
struct Shared {
    known: Mutex<Known>,
    changed: Condvar,
}

/// The kernel, as all servers and users of a test see it.
#[derive(Clone, Default)]
pub(super) struct Fake(Arc<Shared>);

/// How one server has it: with one device's file.
pub(super) struct Handle {
    fake: Fake,
    opened: Mutex<Option<u32>>,
}

impl Fake {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().expect("no test thread panicked with it")
    }

    /// As a server opens it.
    pub(super) fn handle(&self) -> Handle {
        Handle { fake: self.clone(), opened: Mutex::default() }
    }

    /// Refuses such commands with this errno from now on.
    pub(super) fn refuse(&self, command: Control, errno: i32) {
        self.known().refuses = Some((command, errno));
    }

    pub(super) fn devices(&self) -> Vec<u32> {
        self.known().devices.keys().copied().collect()
    }

    pub(super) fn state(&self, id: u32) -> State {
        self.known().devices[&id].info.state
    }

    pub(super) fn params(&self, id: u32) -> Vec<u8> {
        self.known().devices[&id].params.clone().unwrap_or_default()
    }

    /// Waits until `is` holds.
    fn until(
        &self,
        limit: Duration,
        mut is: impl FnMut(&mut Known) -> bool,
    ) -> io::Result<MutexGuard<'_, Known>> {
        let deadline = Instant::now() + limit;
        let mut known = self.known();
        while !is(&mut known) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            known = self.0.changed.wait_timeout(known, left).expect("as known").0;
        }
        Ok(known)
    }

    /// A user's request; the data that was read, or the errno.
    pub(super) fn request(
        &self,
        id: u32,
        op_flags: u32,
        sector: u64,
        data: Vec<u8>,
    ) -> Result<Vec<u8>, i32> {
        let sectors = (data.len() / 512) as u32;
        self.request_sectors(id, Descriptor { op_flags, sectors, start: sector }, data)
    }

    pub(super) fn request_sectors(
        &self,
        id: u32,
        descriptor: Descriptor,
        data: Vec<u8>,
    ) -> Result<Vec<u8>, i32> {
        let mut known = self.known();
        known.next += 1;
        let number = known.next;
        let device = known.devices.get_mut(&id).ok_or(libc::ENODEV)?;
        if device.info.state == State::Dead {
            return Err(libc::EIO);
        }
        device.requests.insert(number, Request { descriptor, data, result: None });
        device.waiting.push_back(number);
        device.dispatch();
        drop(known);
        let done = |known: &mut Known| known.devices[&id].requests[&number].result.is_some();
        let mut known = self.until(LIMIT, done).expect("a request is answered");
        let device = known.devices.get_mut(&id).expect("it was there");
        let request = device.requests.remove(&number).expect("it was there");
        match request.result {
            Some(result) if result >= 0 => Ok(request.data),
            result => Err(-result.unwrap_or(0)),
        }
    }

    /// `kill -9` of the server: its threads end where they wait.
    pub(super) fn kill(&self, id: u32) {
        let mut known = self.known();
        let device = known.devices.get_mut(&id).expect("a device");
        device.killed = true;
        device.queues.iter().for_each(|queue| signal(queue.wake.as_ref()));
        drop(known);
        let gone = |known: &mut Known| known.devices[&id].threads == 0;
        drop(self.until(LIMIT, gone).expect("its threads end"));
    }

    fn thread_ended(&self, id: u32) {
        let mut known = self.known();
        let Some(device) = known.devices.get_mut(&id) else { return };
        device.threads -= 1;
        if device.killed && device.threads == 0 {
            device.open = false;
            device.info.pid = DEAD_PID;
            let recovers = device.info.flags & RECOVERY != 0;
            device.info.state = if recovers { State::Quiesced } else { State::Dead };
            for entry in device.queues.iter().flat_map(|queue| &queue.entries) {
                let Entry::Busy(number) = entry else { continue };
                if recovers {
                    device.waiting.push_front(*number);
                }
            }
            if !recovers {
                for request in device.requests.values_mut() {
                    request.result.get_or_insert(-libc::EIO);
                }
            }
        }
        self.0.changed.notify_all();
    }
}

impl Driver for Handle {
    type Entries = FakeEntries;

    fn control(
        &self,
        command: Control,
        id: u32,
        payload: Payload,
        limit: Duration,
    ) -> io::Result<Vec<u8>> {
        let errno = |errno| Err(io::Error::from_raw_os_error(errno));
        let mut known = self.fake.known();
        if let Some((refused, code)) = known.refuses
            && refused == command
        {
            return errno(code);
        }
        if command == Control::Add {
            let mut info = Info::decode(payload.bytes[..].try_into().expect("64 bytes"));
            assert_eq!(info.id, id, "the header and the description name one device");
            let free = (0..).find(|id| !known.devices.contains_key(id)).expect("one is free");
            info.id = if id == ANY_DEVICE { free } else { id };
            if known.devices.contains_key(&info.id) {
                return errno(libc::EEXIST);
            }
            info.queues = info.queues.min(PROCESSORS);
            info.state = State::Dead;
            info.pid = 0;
            known.devices.insert(info.id, Device::new(info));
            return Ok(info.encode().to_vec());
        }
        let Some(device) = known.devices.get_mut(&id) else { return errno(libc::ENODEV) };
        match command {
            Control::Add => unreachable!(),
            Control::GetInfo => return Ok(device.info.encode().to_vec()),
            Control::GetParams => return Ok(device.params.clone().unwrap_or_default()),
            Control::SetParams if device.info.state == State::Live => return errno(libc::EACCES),
            Control::SetParams => device.params = Some(payload.bytes.clone()),
            Control::StartRecovery if device.info.state != State::Quiesced || device.open => {
                return errno(libc::EBUSY);
            }
            Control::StartRecovery => device.reset(),
            Control::Start | Control::EndRecovery => {
                if device.params.is_none() {
                    return errno(libc::EINVAL);
                }
                drop(known);
                let mut known = self.fake.until(limit, |known| known.devices[&id].all_given())?;
                let device = known.devices.get_mut(&id).expect("it was there");
                device.info.state = State::Live;
                device.info.pid = payload.data as i32;
                device.dispatch();
            }
            Control::Stop => {
                drop(known);
                let mut known = self.fake.until(limit, |known| known.devices[&id].idle())?;
                let device = known.devices.get_mut(&id).expect("it was there");
                device.info.state = State::Dead;
                for queue in &mut device.queues {
                    for (tag, entry) in queue.entries.iter_mut().enumerate() {
                        if let Entry::Driver(buffer) = std::mem::replace(entry, Entry::Server) {
                            let tag = tag as u16;
                            queue.events.push(Event { tag, result: ABORTED, buffer });
                        }
                    }
                    signal(queue.wake.as_ref());
                }
            }
            Control::Delete => {
                drop(known);
                let free = |known: &mut Known| {
                    let device = &known.devices[&id];
                    !device.open && device.threads == 0
                };
                self.fake.until(limit, free)?.devices.remove(&id);
            }
        }
        Ok(payload.bytes)
    }

    fn open(&self, id: u32, _: Duration) -> io::Result<()> {
        let mut known = self.fake.known();
        let device = known.devices.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        assert!(!device.open, "a device's file is opened once");
        device.open = true;
        *self.opened.lock().expect("as known") = Some(id);
        Ok(())
    }

    fn entries(&self, info: &Info, queue: u16, wake: Arc<EventFd>) -> io::Result<FakeEntries> {
        let mut known = self.fake.known();
        let device = known.devices.get_mut(&info.id).ok_or(io::ErrorKind::NotFound)?;
        assert!(device.open, "the file is open before its queues are served");
        device.threads += 1;
        device.queues[usize::from(queue)].wake = Some(wake.clone());
        Ok(FakeEntries { fake: self.fake.clone(), id: info.id, queue: queue.into(), wake })
    }

    fn close(&self) {
        let Some(id) = self.opened.lock().expect("as known").take() else { return };
        if let Some(device) = self.fake.known().devices.get_mut(&id) {
            device.open = false;
        }
        self.fake.0.changed.notify_all();
    }
}

pub(super) struct FakeEntries {
    fake: Fake,
    id: u32,
    queue: usize,
    wake: Arc<EventFd>,
}

impl Entries for FakeEntries {
    fn descriptor(&self, tag: u16) -> Descriptor {
        let known = self.fake.known();
        let queue = &known.devices[&self.id].queues[self.queue];
        queue.descriptors[usize::from(tag)].expect("only an entry that has a request is looked at")
    }

    fn submit(&mut self, io: Io, tag: u16, mut buffer: Buffer) -> io::Result<()> {
        let mut known = self.fake.known();
        let device = known.devices.get_mut(&self.id).ok_or(io::ErrorKind::NotFound)?;
        assert_eq!(buffer.as_mut().len(), device.info.max_request as usize);
        let entry = &mut device.queues[self.queue].entries[usize::from(tag)];
        match (std::mem::replace(entry, Entry::Server), io) {
            (Entry::Server, Io::Fetch) => {}
            (Entry::Busy(number), Io::Commit(result)) => {
                let request = device.requests.get_mut(&number).expect("it is in hand");
                let length = request.data.len();
                match Operation::of(&request.descriptor) {
                    Operation::Read if result >= 0 => {
                        assert_eq!(result as usize, length, "all of it was read");
                        request.data.copy_from_slice(&buffer.as_mut()[..length]);
                    }
                    Operation::Write if result >= 0 => assert_eq!(result as usize, length),
                    _ => assert!(result <= 0, "nothing is counted there"),
                }
                request.result = Some(result);
            }
            (_, io) => panic!("entry {tag} cannot be given by {io:?} now"),
        }
        *entry = Entry::Driver(buffer);
        device.dispatch();
        drop(known);
        self.fake.0.changed.notify_all();
        Ok(())
    }

    fn wait(&mut self, events: &mut Vec<Event>) -> io::Result<()> {
        {
            let mut known = self.fake.known();
            let device = known.devices.get_mut(&self.id).ok_or(io::ErrorKind::NotFound)?;
            if device.killed {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            events.append(&mut device.queues[self.queue].events);
        }
        if events.is_empty() {
            let timeout = PollTimeout::from(u16::try_from(LIMIT.as_millis()).expect("20 s"));
            poll(&mut [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)], timeout)?;
            // It is empty if the time is over.
            let _ = self.wake.read();
        }
        Ok(())
    }
}

impl Drop for FakeEntries {
    fn drop(&mut self) {
        self.fake.thread_ended(self.id);
    }
}
