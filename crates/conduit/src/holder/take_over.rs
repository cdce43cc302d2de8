//! The upgrade of a holder: its successor gets the tap, the lock and every frame, and only when it has
//! said so does the old one end. Frames that come meanwhile wait in the tap's own queue.

use super::{
    Stats,
    protocol::{Answer, Ask, Channel, Part, VERSION},
};
use crate::exec::KernelError;
use std::{
    fs::File,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    time::{Duration, Instant},
};

/// How long each step of a hand-over may take.
const STEP: Duration = Duration::from_secs(5);
/// More than any holder's limits allow.
const FRAMES: u64 = 4 << 20;

/// What a holder has.
pub(super) struct Luggage {
    pub(super) tap: OwnedFd,
    pub(super) lock: OwnedFd,
    /// Frames, and when each came.
    pub(super) frames: Vec<(Instant, Box<[u8]>)>,
    pub(super) stats: Stats,
}

/// Becomes the only holder of this socket; waits for one that is about to be gone.
pub(super) fn lock(socket: &Path, limit: Duration) -> Result<OwnedFd, KernelError> {
    let path = socket.with_extension("lock");
    let fail = |e: io::Error| KernelError::new(format!("lock {}", path.display()), e);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(fail)?;
    }
    let file = File::options().create(true).append(true).open(&path).map_err(fail)?;
    let deadline = Instant::now() + limit;
    loop {
        match file.try_lock() {
            // It is of the open file, which a successor gets: not unlocked until the last one closes.
            Ok(()) => return Ok(file.into()),
            Err(e) if Instant::now() >= deadline => {
                let detail =
                    format!("{e}; another holder runs (conduit hold --take-over replaces it)");
                return Err(KernelError::new(format!("lock {}", path.display()), detail));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The old holder's part. An error means that it still is the holder.
pub(super) fn give(
    to: &Channel,
    tap: BorrowedFd<'_>,
    lock: BorrowedFd<'_>,
    stats: Stats,
    frames: &[(Duration, Box<[u8]>)],
) -> io::Result<()> {
    to.set_limit(STEP)?;
    let first = Answer::HandingOver { version: VERSION, frames: frames.len() as u64, stats };
    to.say(&first, &[tap, lock])?;
    for (age, bytes) in frames {
        to.say_part(&Part::Frame { age: *age, bytes: bytes.clone() })?;
    }
    to.say_part(&Part::Done)?;
    match to.hear::<Ask>()? {
        Some((Ask::Taken, _)) => Ok(()),
        other => Err(io::Error::other(format!("not taken: {:?}", other.map(|(ask, _)| ask)))),
    }
}

/// The successor's part: what the holder at `socket` had. It ends when [`taken`] is said.
pub(super) fn take(socket: &Path) -> Result<(Luggage, Channel), KernelError> {
    let fail = |e: io::Error| {
        KernelError::new(format!("take over from the holder at {}", socket.display()), e)
    };
    let channel = Channel::connect(socket, STEP).map_err(fail)?;
    let luggage = receive(&channel).map_err(fail)?;
    Ok((luggage, channel))
}

fn receive(channel: &Channel) -> io::Result<Luggage> {
    let now = Instant::now();
    let (answer, rights) = channel.ask(Ask::HandOver { version: VERSION })?;
    let Answer::HandingOver { version: VERSION, frames: count, stats } = answer else {
        return Err(io::Error::other(format!("an unexpected answer: {answer:?}")));
    };
    let Ok([tap, lock]) = <[OwnedFd; 2]>::try_from(rights) else {
        return Err(io::Error::other("it gave no tap and no lock"));
    };
    if count > FRAMES {
        return Err(io::Error::other(format!("{count} frames are more than {FRAMES}")));
    }
    let (mut frames, mut buffer) = (Vec::new(), Vec::new());
    loop {
        match channel.hear_part(&mut buffer)? {
            Part::Done if frames.len() as u64 == count => break,
            Part::Frame { age, bytes } if (frames.len() as u64) < count => {
                frames.push((now.checked_sub(age).unwrap_or(now), bytes));
            }
            _ => {
                return Err(io::Error::other(format!(
                    "not the {count} frames that were announced"
                )));
            }
        }
    }
    Ok(Luggage { tap, lock, frames, stats })
}

/// Tells the old holder that all is here and served.
pub(super) fn taken(channel: &Channel) -> io::Result<()> {
    channel.say(&Ask::Taken, &[])
}
