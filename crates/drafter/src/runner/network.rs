//! The machine's network as its runner sees it: the host's data path, and the flip that this host still
//! owes it.
//!
//! ```text
//!   flip that nobody answers ──▶ owed ── asked again, every second at most ──▶ led here
//!                                  ├── a newer flip, a divert, the machine's end ──▶ owed no more
//!                                  └── refused: somebody has a newer one        ──▶ owed no more, and said
//!                                                                                   until the next flip
//! ```
//!
//! A machine runs by its lease, not by its network: an agent that is dead when the machine lands, or when
//! it goes on where it was, is no reason to stop it. But until the agent has heard the flip the clients
//! reach nobody, so it is asked until it answers, and the status says so meanwhile. A flip may be asked for
//! any number of times: the data path compares epochs.

use conduit::{DataPath, HostEndpoint, MachineNet, NetError, Tap};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Between two attempts: at first, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A data path that remembers what it could not tell.
pub(super) struct Network {
    path: Arc<dyn DataPath>,
    owed: Mutex<Owing>,
    making: Mutex<Option<Making>>,
}

/// A tap that is being made.
struct Making {
    net: MachineNet,
    blackout: Option<Duration>,
    tap: JoinHandle<Result<Tap, NetError>>,
}

#[derive(Default)]
struct Owing {
    flip: Option<Owed>,
    /// Why the last flip was refused for good.
    refused: Option<String>,
    /// Somebody asks again.
    asking: bool,
}

#[derive(Clone)]
struct Owed {
    net: MachineNet,
    flip: u64,
    since: Instant,
    /// Once it has failed.
    why: Option<String>,
}

impl Network {
    pub(super) fn over(path: Arc<dyn DataPath>) -> Arc<Self> {
        Arc::new(Self { path, owed: Mutex::default(), making: Mutex::default() })
    }

    /// Begins to make the machine's tap, beside everything else that a start needs; [`Network::tap`] with
    /// the same arguments returns it. It stands still for about `blackout`, if that is known.
    pub(super) fn make_tap(&self, net: &MachineNet, blackout: Option<Duration>) {
        let (path, wanted) = (Arc::clone(&self.path), net.clone());
        let making = thread::Builder::new()
            .name("tap".into())
            .spawn(move || make_tap(&*path, &wanted, blackout));
        // Without a thread it is made when it is asked for.
        let making = making.ok().map(|tap| Making { net: net.clone(), blackout, tap });
        *self.making.lock().unwrap_or_else(PoisonError::into_inner) = making;
    }

    /// The machine's tap.
    pub(super) fn tap(
        &self,
        net: &MachineNet,
        blackout: Option<Duration>,
    ) -> Result<Tap, NetError> {
        let making = self.making.lock().unwrap_or_else(PoisonError::into_inner).take();
        let same = making.filter(|making| making.net == *net && making.blackout == blackout);
        match same.map(|making| making.tap.join()) {
            Some(Ok(made)) => made,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => make_tap(&*self.path, net, blackout),
        }
    }

    /// What [`Network::make_tap`] began nobody has asked for, and nobody will: the machine is not expected
    /// here under `flip`.
    pub(super) fn unmake_tap(&self, flip: u64) {
        let making = self.making.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Making { net, tap, .. }) = making else { return };
        // Closed before it is removed.
        drop(tap.join());
        if let Err(error) = self.path.forget(&net, flip) {
            tracing::warn!(%error, "the network still expects the machine here");
        }
    }

    /// A machine that runs here whatever its network says: frames for it come here under `flip`, as soon
    /// as somebody answers. Tried once before this returns.
    pub(super) fn lead_here(self: &Arc<Self>, net: &MachineNet, flip: u64) {
        match self.resume(net, flip) {
            Ok(()) => {}
            Err(error) if is_final(&error) => {
                tracing::error!(%error, "the network does not lead here");
                self.lock().refused = Some(error.to_string());
            }
            Err(error) => {
                tracing::error!(%error, "the network does not lead here yet; it is asked again");
                self.owe(net, flip, Some(error.to_string()));
            }
        }
    }

    /// As [`Network::lead_here`], without any wait.
    pub(super) fn lead_here_soon(self: &Arc<Self>, net: &MachineNet, flip: u64) {
        self.owe(net, flip, None);
    }

    /// The machine does not run here, or not for long any more: whatever is owed, nobody needs it.
    pub(super) fn owe_nothing(&self) {
        let mut owing = self.lock();
        (owing.flip, owing.refused) = (None, None);
    }

    /// In one line: since when the network does not lead here, and what to do.
    pub(super) fn trouble(&self) -> Option<String> {
        let (owed, refused) = {
            let owing = self.lock();
            (owing.flip.clone(), owing.refused.clone())
        };
        if let Some(refused) = refused {
            return Some(format!(
                "the network refused to lead here ({refused}), so that its clients may not reach it: \
                 somebody has led it elsewhere since. Move the machine, or stop it here if it runs there"
            ));
        }
        let owed = owed?;
        let why = owed.why?;
        Some(format!(
            "the network does not lead here since {:.0} s ({why}), so that its clients do not reach it: it is \
             asked again all the time. See that `conduit agent` runs on this host",
            owed.since.elapsed().as_secs_f64(),
        ))
    }

    fn lock(&self) -> MutexGuard<'_, Owing> {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owe(self: &Arc<Self>, net: &MachineNet, flip: u64, why: Option<String>) {
        let mut owing = self.lock();
        if owing.flip.as_ref().is_some_and(|owed| owed.flip >= flip) {
            return;
        }
        owing.refused = None;
        owing.flip = Some(Owed { net: net.clone(), flip, since: Instant::now(), why });
        if owing.asking {
            return;
        }
        let network = Arc::downgrade(self);
        let begun =
            thread::Builder::new().name("network".into()).spawn(move || ask_again(&network));
        match begun {
            Ok(_) => owing.asking = true,
            Err(error) => {
                tracing::error!(%error, "no thread to ask the network again; move or restart the runner");
            }
        }
    }

    /// Something was said at `flip`: what was owed up to then is owed no more.
    fn overtaken(&self, flip: u64) {
        let mut owing = self.lock();
        owing.refused = None;
        if owing.flip.as_ref().is_some_and(|owed| owed.flip <= flip) {
            owing.flip = None;
        }
    }

    /// Asks once for what is owed. False if nothing is owed any more.
    fn ask(&self) -> bool {
        let owed = {
            let mut owing = self.lock();
            let owed = owing.flip.clone();
            // Under the lock: who owes after this starts another thread.
            owing.asking = owed.is_some();
            owed
        };
        let Some(Owed { net, flip, since, .. }) = owed else { return false };
        match self.path.resume(&net, flip) {
            Ok(()) => {
                self.overtaken(flip);
                let after = since.elapsed();
                tracing::info!(machine = net.machine, flip, ?after, "the network leads here");
            }
            Err(error) if is_final(&error) => {
                tracing::warn!(%error, "the network does not lead here, and is not asked again");
                let mut owing = self.lock();
                // Unless this host itself has said something newer meanwhile.
                if owing.flip.take_if(|owed| owed.flip == flip).is_some() {
                    owing.refused = Some(error.to_string());
                }
            }
            Err(error) => {
                if let Some(owed) = self.lock().flip.as_mut().filter(|owed| owed.flip == flip) {
                    owed.why = Some(error.to_string());
                }
            }
        }
        true
    }
}

fn make_tap(
    path: &dyn DataPath,
    net: &MachineNet,
    blackout: Option<Duration>,
) -> Result<Tap, NetError> {
    match blackout {
        Some(blackout) => path.prepare_for(net, blackout),
        None => path.prepare(net),
    }
}

fn ask_again(network: &Weak<Network>) {
    let mut pause = Duration::ZERO;
    loop {
        thread::sleep(pause);
        // A runner that is gone owes nothing.
        let Some(network) = network.upgrade() else { return };
        if !network.ask() {
            return;
        }
        pause = (pause * 2).clamp(AGAIN.0, AGAIN.1);
    }
}

/// Whether asking again is of no use: somebody has said something newer.
const fn is_final(error: &NetError) -> bool {
    matches!(error, NetError::StaleEpoch { .. } | NetError::EpochTaken { .. })
}

impl DataPath for Network {
    fn endpoint(&self) -> HostEndpoint {
        self.path.endpoint()
    }

    fn prepare(&self, net: &MachineNet) -> Result<Tap, NetError> {
        self.path.prepare(net)
    }

    fn prepare_for(&self, net: &MachineNet, blackout: Duration) -> Result<Tap, NetError> {
        self.path.prepare_for(net, blackout)
    }

    fn expect(&self, net: &MachineNet, blackout: Duration) -> Result<(), NetError> {
        self.path.expect(net, blackout)
    }

    fn divert(&self, net: &MachineNet, to: &HostEndpoint, epoch: u64) -> Result<(), NetError> {
        self.overtaken(epoch);
        self.path.divert(net, to, epoch)
    }

    fn pause(
        &self,
        net: &MachineNet,
        tap: &Tap,
        to: &HostEndpoint,
        epoch: u64,
    ) -> Result<u64, NetError> {
        self.overtaken(epoch);
        self.path.pause(net, tap, to, epoch)
    }

    fn resume(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let answer = self.path.resume(net, epoch);
        if answer.as_ref().err().is_none_or(is_final) {
            self.overtaken(epoch);
        }
        answer
    }

    fn abort(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        let answer = self.path.abort(net, epoch);
        if answer.as_ref().err().is_none_or(is_final) {
            self.overtaken(epoch);
        }
        answer
    }

    fn settled(&self, net: &MachineNet, epoch: u64, limit: Duration) -> Result<(), NetError> {
        self.path.settled(net, epoch, limit)
    }

    fn forget(&self, net: &MachineNet, epoch: u64) -> Result<(), NetError> {
        self.overtaken(epoch);
        self.path.forget(net, epoch)
    }
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
