//! What the driver of a source gives it, tells it, and is asked to do.

use crate::{
    block::{BlockIndex, BlockRange, BlockSet},
    device::DeviceName,
    geometry::Geometry,
    hash::RootHash,
    model::{History, Owner, Replica},
    order::{Class, Heat},
    rounds::{Epoch, Rounds},
    session::{
        link::{LinkId, Patience},
        messages::{
            BlockHash, BlockHeader, Custom, DeviceIndex, Reason, ToDestination, ToSource, Wait,
        },
        pace::Policy,
    },
};
use std::{sync::Arc, time::Duration};

/// How a source behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes of blocks that may be on their way, not confirmed. Of a group's half of it is divided,
    /// and kept for each of its devices: one that is stuck never stops the others.
    pub window: u64,
    /// Bytes beyond the window for blocks that somebody waits for.
    pub demand_window: u64,
    /// Longest waits.
    pub patience: Patience,
    /// When rounds end.
    pub policy: Policy,
    /// A half-life of volatility.
    pub half_life: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            window: 8 << 20,
            demand_window: 4 << 20,
            patience: Patience::default(),
            policy: Policy::default(),
            half_life: Duration::from_secs(1),
        }
    }
}

/// A device to give away.
#[derive(Debug)]
pub struct SourceDevice {
    /// Its name in the group.
    pub name: DeviceName,
    /// What blocks at [`Epoch::BASE`] are.
    pub base: Option<RootHash>,
    /// Size and blocks.
    pub geometry: Geometry,
    /// Clock and epochs.
    pub rounds: Arc<Rounds>,
    /// Who owned it when.
    pub history: History,
    /// Blocks that have not come here themselves yet: this side is still filling.
    pub absent: BlockSet,
    /// How volatile its blocks are.
    pub heat: Heat,
    /// The last round, if the device was given away already.
    pub last: Option<Epoch>,
}

impl SourceDevice {
    /// A device as its replica knows it now.
    #[must_use]
    pub fn new(name: DeviceName, base: Option<RootHash>, replica: &Replica) -> Self {
        Self {
            name,
            base,
            geometry: replica.geometry(),
            rounds: Arc::clone(replica.rounds()),
            history: replica.history().clone(),
            absent: replica.absent().clone(),
            heat: Heat::new(replica.geometry().blocks()),
            last: (replica.owner() == Owner::Elsewhere).then(|| replica.clock()),
        }
    }
}

/// What happens to a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The transport has a new link to the destination; an older one is gone.
    Connected(LinkId),
    /// A link is cut.
    Cut(LinkId),
    /// A control message came.
    Received(LinkId, ToSource),
    /// The answer to [`Action::CloseRound`]: the rounds that are closed now, by device.
    RoundClosed(Vec<Epoch>),
    /// The answer to [`Action::Quiesce`]; see the module for what it promises.
    Quiesced {
        /// The number that came with the request.
        ticket: u32,
        /// The last rounds, by device.
        epochs: Vec<Epoch>,
        /// Flushes to be done again at the destination, by device.
        flushes: Vec<Vec<u64>>,
        /// What the layer above needs to run.
        state: Vec<u8>,
    },
    /// A request of this machine cannot be fulfilled.
    Unable(Reason),
    /// Blocks that were absent here have come.
    Arrived(DeviceIndex, BlockRange),
    /// A store has these blocks, durably, with the contents of `epoch`, one of this device's rounds.
    Promised {
        /// Which device.
        device: DeviceIndex,
        /// As of which round.
        epoch: Epoch,
        /// The blocks.
        blocks: Vec<(BlockIndex, BlockHash)>,
    },
    /// The recorded order of first use.
    Expected(DeviceIndex, Vec<BlockRange>),
    /// The layer above has something to say to its peer.
    Custom {
        /// What it is.
        kind: u32,
        /// At most [`MAX_CUSTOM`](crate::session::messages::MAX_CUSTOM).
        payload: Vec<u8>,
    },
    /// The layer above has handled a custom event.
    CustomHandled(u32),
    /// Hand over at the next chance: ends [`Policy::hold`].
    Switch,
    /// Stop, if that is still possible.
    Cancel(String),
    /// The lease shows that the destination does not own the devices and never will by this token.
    Reclaimed,
}

/// What a source wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send on the control connection, in order.
    Send(LinkId, ToDestination),
    /// Read these blocks, encode and send them, on any connection of the link. Without the content
    /// there is no going on: answer with [`Event::Unable`] if it cannot be read.
    Blocks(LinkId, BlockHeader),
    /// Close a round of every device, mapped memory scanned before; then [`Event::RoundClosed`].
    CloseRound,
    /// Pause writers; then [`Event::Quiesced`] with this number.
    Quiesce(u32),
    /// Let writers go on here: takes back the last [`Action::Quiesce`], whether it was answered or
    /// not, and the note that authority leaves. This side is the owner.
    Resume,
    /// These blocks are not here: have them sent, as urgent as the class says; then
    /// [`Event::Arrived`].
    Pull(DeviceIndex, BlockRange, Class),
    /// The destination runs. Content must be kept, and be durable.
    HandedOver,
    /// The token is out and nobody answers: ask the lease who owns the devices. Then
    /// [`Event::Reclaimed`], or wait on.
    Undecided,
    /// Something takes longer than it should; nothing is given up.
    Overdue(Wait),
    /// The destination does not need this side any more.
    Released,
    /// The move is over without success; see [`Action::Resume`] for whether this side goes on.
    Failed(Reason),
    /// Close this link; it is of no use.
    Hangup(LinkId),
    /// Something for the layer above; answer with [`Event::CustomHandled`].
    Custom(Custom),
}

/// Where a source stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Rounds, while writers write.
    Filling,
    /// Writers are about to pause.
    Quiescing,
    /// Writers are paused; blocks go before the token.
    Draining,
    /// The token is out.
    Switched,
    /// The destination runs.
    Serving,
    /// Not needed any more.
    Released,
    /// Over.
    Failed(Reason),
}

/// What was counted, in blocks where nothing else is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sent, by class in the order of [`Class::ALL`].
    pub sent: [u64; 4],
    /// Sent again because the destination could not take them.
    pub again: u64,
    /// Not sent because they came to the destination otherwise.
    pub spared: u64,
    /// Links that were used.
    pub links: u64,
}
