//! One TCP stream of random bytes at a set rate, towards a machine: a download that it has begun, or
//! bulk that is sent to it. When the other end has acknowledged something is noted all the time, so that
//! a silence is seen from here, by a clock that does not stand still with the machine.

use super::{TcpReport, sys, timeline::Timeline};
use std::{
    hash::Hasher,
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use twox_hash::XxHash3_64;

/// How often the kernel is asked what was acknowledged.
const LOOK: Duration = Duration::from_millis(1);
/// How long a write may be stuck, or the other end may take to begin.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of one write.
const PIECE: usize = 8 << 10;

/// What was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes, all of which the other end has read.
    pub bytes: u64,
    /// Their XXH3-64, hex.
    pub hash: String,
    /// What this end's kernel did.
    pub tcp: TcpReport,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    ended: AtomicBool,
    acknowledged: AtomicU64,
}

/// A stream that flows. Dropping it ends it.
pub struct Stream {
    shared: Arc<Shared>,
    timeline: Timeline,
    sender: Option<JoinHandle<io::Result<Sent>>>,
    watcher: Option<JoinHandle<io::Result<()>>>,
}

impl Stream {
    /// Sends `rate` bytes a second to whoever connects to `listener` first.
    pub fn serve(listener: &TcpListener, rate: u64) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let deadline = Instant::now() + LIMIT;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Self::over(stream, rate);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                    std::thread::sleep(LOOK);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Sends `rate` bytes a second over a connection.
    pub fn over(stream: TcpStream, rate: u64) -> io::Result<Self> {
        stream.set_write_timeout(Some(LIMIT))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_nodelay(true)?;
        let shared = Arc::new(Shared::default());
        let timeline = Timeline::new(Instant::now());
        let watched = stream.try_clone()?;
        let (sending, watching, line) = (shared.clone(), shared.clone(), timeline.clone());
        let builder = |name: &str| std::thread::Builder::new().name(name.into());
        let watcher = builder("acks").spawn(move || watch(&watched, &watching, &line))?;
        let sender = builder("stream").spawn(move || {
            let sent = send(stream, rate, &sending);
            sending.ended.store(true, Ordering::Release);
            sent
        })?;
        Ok(Self { shared, timeline, sender: Some(sender), watcher: Some(watcher) })
    }

    /// The record of silences: times in which nothing was acknowledged.
    #[must_use]
    pub fn timeline(&self) -> Timeline {
        self.timeline.clone()
    }

    /// Bytes acknowledged so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until `more` further bytes are acknowledged; false if that took longer than `limit`.
    #[must_use]
    pub fn wait_for(&self, more: u64, limit: Duration) -> bool {
        let (goal, deadline) = (self.acknowledged() + more, Instant::now() + limit);
        while self.acknowledged() < goal {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    /// Ends the stream; an error if it broke, or the other end has not read all of it.
    pub fn finish(mut self) -> io::Result<Sent> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let panicked = || io::Error::other("its thread panicked");
        let sender = self.sender.take().expect("taken only here and on drop");
        let sent = sender.join().map_err(|_| panicked())?;
        let watcher = self.watcher.take().expect("taken only here and on drop");
        watcher.join().map_err(|_| panicked())??;
        sent
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            let _ = sender.join();
        }
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

fn send(mut stream: TcpStream, rate: u64, shared: &Shared) -> io::Result<Sent> {
    let mut hash = XxHash3_64::new();
    let mut data = vec![0; PIECE];
    getrandom::fill(&mut data).map_err(|e| io::Error::other(e.to_string()))?;
    let (start, mut bytes) = (Instant::now(), 0_u64);
    while !shared.stop.load(Ordering::Relaxed) {
        let due = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        std::thread::sleep((start + due).saturating_duration_since(Instant::now()));
        // No two pieces are the same.
        data[..8].copy_from_slice(&bytes.to_le_bytes());
        stream.write_all(&data)?;
        hash.write(&data);
        bytes += data.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    // Who has read all of it closes; who has not resets.
    if stream.read(&mut [0])? != 0 {
        return Err(io::Error::other("the other end answered something"));
    }
    let tcp = TcpReport::of(&sys::tcp_info(&stream)?);
    Ok(Sent { bytes, hash: format!("{:016x}", hash.finish()), tcp })
}

fn watch(stream: &TcpStream, shared: &Shared, timeline: &Timeline) -> io::Result<()> {
    let mut last = 0;
    while !shared.ended.load(Ordering::Acquire) {
        let acknowledged = sys::tcp_info(stream)?.bytes_acknowledged;
        if acknowledged > last {
            timeline.answered(Instant::now());
            shared.acknowledged.store(acknowledged, Ordering::Relaxed);
            last = acknowledged;
        }
        if shared.stop.load(Ordering::Relaxed) {
            timeline.end();
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_was_sent_is_what_came_by_its_hash_and_a_silence_of_the_reader_is_seen() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let (pause, paused) = std::sync::mpsc::channel::<()>();
        let reader = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(to).unwrap();
            let mut hash = XxHash3_64::new();
            let mut buffer = vec![0; 4096];
            let mut bytes = 0;
            loop {
                let size = stream.read(&mut buffer).unwrap();
                if size == 0 {
                    return (bytes, format!("{:016x}", hash.finish()));
                }
                hash.write(&buffer[..size]);
                bytes += size as u64;
                if paused.try_recv().is_ok() {
                    std::thread::sleep(Duration::from_millis(300));
                }
            }
        });
        // More than the buffers of both ends take in the time of the pause.
        let stream = Stream::serve(&listener, 100_000_000).unwrap();
        assert!(stream.wait_for(1 << 20, Duration::from_secs(10)));
        let before = Instant::now();
        pause.send(()).unwrap();
        assert!(stream.wait_for(40 << 20, Duration::from_secs(20)));
        let silence = stream.timeline().longest_between(before, Instant::now());
        assert!(silence > Duration::from_millis(100), "{silence:?}");
        let sent = stream.finish().unwrap();
        assert_eq!((sent.bytes, sent.hash), reader.join().unwrap());
    }
}
