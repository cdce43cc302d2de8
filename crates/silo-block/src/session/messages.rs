//! What the two ends of a move say to each other, as types. The bytes are made by `silo_move::wire`;
//! who says what and when is in [`source`](super::source) and [`destination`](super::destination).
//!
//! Control messages travel in order on one connection; blocks travel on others, in any order. Every
//! message may come twice, or late, and then changes nothing.

use crate::{
    block::{BlockIndex, BlockRange},
    device::DeviceName,
    geometry::Geometry,
    hash::RootHash,
    order::Class,
    rounds::Epoch,
};
use std::{fmt, time::Duration};

/// Version of the meaning of these messages; both ends must say the same.
pub const VERSION: u16 = 1;
/// Most devices of a group.
pub const MAX_DEVICES: usize = 256;
/// Most ranges in one message; longer lists are cut into parts.
pub const MAX_RANGES: usize = 4096;
/// Most ranges in the last lists of a token, over all devices; the rest goes ahead of it in parts.
pub const MAX_TOKEN_RANGES: usize = 16 * MAX_RANGES;
/// Most promised blocks in one message.
pub const MAX_PROMISES: usize = 4096;
/// Longest run of blocks in one message with content, in bytes of the device.
pub const MAX_RUN: u64 = 1 << 20;
/// Longest payload of a custom event, in bytes.
pub const MAX_CUSTOM: usize = 1 << 20;
/// Longest state in a token, in bytes.
pub const MAX_STATE: usize = 64 << 20;
/// Most terms of a history; older ones are forgotten, and whoever only knows those gets all blocks.
pub const MAX_TERMS: usize = 64;
/// Longest text of a reason, in bytes.
pub const MAX_TEXT: usize = 1024;

/// Names a move, and afterwards the time in which its destination owned the devices. Random, made
/// by the source; survives connections.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// A device's place in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIndex(pub u16);

impl fmt::Display for DeviceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {}", self.0)
    }
}

/// BLAKE3 of the content of one block, keyed as the store's owner says.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A time in which one side owned a device: it made the epochs from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// The session that made it the owner; of the first term, a random number.
    pub id: SessionId,
    /// The first epoch of the term.
    pub first: Epoch,
}

/// A device of the group, as the source knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name; the destination finds its own device by it.
    pub name: DeviceName,
    /// Size and block size.
    pub geometry: Geometry,
    /// What blocks at [`Epoch::BASE`] are: a base with this root, or zeros.
    pub base: Option<RootHash>,
    /// Who owned it when, oldest first; the last term is the source's own.
    pub history: Vec<Term>,
    /// The newest round that is closed.
    pub clock: Epoch,
}

/// What the destination has of a device: every block up to `clock`, less the missing ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Lists up to here are applied.
    pub clock: Epoch,
    /// What is missing all the same.
    pub missing: Vec<BlockRange>,
}

/// The last dirty list of a device, inside the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastRound {
    /// The last epoch that the source made.
    pub epoch: Epoch,
    /// Blocks of that round which no [`ToDestination::Round`] has told.
    pub blocks: Vec<BlockRange>,
    /// Flushes that were in flight and are to be done again at the destination, by the numbers
    /// that the front end gave them.
    pub flushes: Vec<u64>,
}

/// What is said from source to destination on the control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToDestination {
    /// The first message of every connection.
    Hello {
        /// [`VERSION`] of the speaker.
        version: u16,
        /// Which move this is.
        session: SessionId,
    },
    /// The devices; after [`ToDestination::Hello`], on every connection.
    Group(Vec<DeviceInfo>),
    /// A dirty list, or a part of one: these blocks are absent until their content of `epoch` comes.
    Round {
        /// Of which device.
        device: DeviceIndex,
        /// The round that the list is of.
        epoch: Epoch,
        /// The blocks, at most [`MAX_RANGES`].
        blocks: Vec<BlockRange>,
        /// The list is complete: answer with [`ToSource::Applied`].
        last: bool,
    },
    /// A store has these blocks; what comes from there counts if it has this hash.
    Promise {
        /// Of which device.
        device: DeviceIndex,
        /// As of which round the blocks have these contents.
        epoch: Epoch,
        /// At most [`MAX_PROMISES`].
        blocks: Vec<(BlockIndex, BlockHash)>,
    },
    /// The order in which blocks are likely to be touched.
    Expect {
        /// Of which device.
        device: DeviceIndex,
        /// Most urgent first, at most [`MAX_RANGES`].
        order: Vec<BlockRange>,
    },
    /// These blocks have not changed since an epoch of an earlier term, although their content came,
    /// or comes, as of the source's last round. Said after the token: whoever the device goes to
    /// next, and had it then, need not get them again.
    Kept {
        /// Of which device.
        device: DeviceIndex,
        /// The last epoch of the earlier term.
        epoch: Epoch,
        /// The blocks, at most [`MAX_RANGES`].
        blocks: Vec<BlockRange>,
    },
    /// Authority over all devices at once. Whoever receives it runs.
    Token {
        /// Which try of this session it is.
        attempt: u32,
        /// The last lists, one for each device of the group.
        devices: Vec<LastRound>,
        /// What the layer above needs in order to run, at most [`MAX_STATE`].
        state: Vec<u8>,
    },
    /// Something of the layer above.
    Custom(Custom),
    /// A [`ToSource::Custom`] was handled.
    CustomDone {
        /// Its serial.
        serial: u32,
    },
    /// The source has seen [`ToSource::Durable`] and keeps nothing any more.
    Released,
    /// The move is over.
    Abort(Reason),
    /// Nothing to say, but here.
    Alive,
}

/// What became of the token, as its receiver says after a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// It has not come.
    Awaited,
    /// That of this try has come. Whether this side runs by it is not certain yet: it may refuse,
    /// or die before it has noted that it owns the devices.
    Taken(u32),
    /// It runs, by this try.
    Runs(u32),
}

/// What is said from destination to source on the control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToSource {
    /// The answer to [`ToDestination::Hello`].
    Hello {
        /// [`VERSION`] of the speaker.
        version: u16,
        /// Which move this is.
        session: SessionId,
    },
    /// What is missing of a device, a part that is followed by more, if the list is long.
    Missing {
        /// Of which device.
        device: DeviceIndex,
        /// At most [`MAX_RANGES`].
        blocks: Vec<BlockRange>,
    },
    /// The answer to [`ToDestination::Group`]: what the destination has, one for each device.
    Have {
        /// In the order of the group; `missing` adds to [`ToSource::Missing`].
        devices: Vec<Held>,
        /// What became of the token.
        token: Token,
    },
    /// A dirty list is applied: no read of its blocks returns what was there before.
    Applied {
        /// Of which device.
        device: DeviceIndex,
        /// The round.
        epoch: Epoch,
    },
    /// A run of blocks was dealt with: stored, or not needed any more. Returns its bytes to the
    /// sender's budget.
    Receipt {
        /// Of which device.
        device: DeviceIndex,
        /// The run as it was sent.
        range: BlockRange,
        /// The epoch that it was sent as.
        epoch: Epoch,
        /// Parts that could not be taken at that moment and are to be sent again.
        retry: Vec<BlockRange>,
    },
    /// Somebody waits for these blocks.
    Need {
        /// Of which device.
        device: DeviceIndex,
        /// At most [`MAX_RUN`] long.
        range: BlockRange,
        /// How urgent: demand, or prefetch.
        class: Class,
    },
    /// These blocks came from elsewhere or were written here: do not send them.
    DontNeed {
        /// Of which device.
        device: DeviceIndex,
        /// The blocks.
        range: BlockRange,
        /// Lists were applied up to here when this was said: what a later list has is needed.
        epoch: Epoch,
    },
    /// The token was received and this side runs.
    Running {
        /// The try.
        attempt: u32,
    },
    /// The token was received and will never be used: the source may run again.
    Refused {
        /// The try.
        attempt: u32,
        /// Why.
        reason: Reason,
    },
    /// Everything up to these epochs, one for each device, survives a loss of the source.
    Durable {
        /// In the order of the group.
        epochs: Vec<Epoch>,
    },
    /// Something of the layer above.
    Custom(Custom),
    /// A [`ToDestination::Custom`] was handled.
    CustomDone {
        /// Its serial.
        serial: u32,
    },
    /// The move is over.
    Abort(Reason),
    /// Nothing to say, but here.
    Alive,
}

/// An event of the layer above, delivered once and in order, across reconnects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Custom {
    /// Counts up from 1 on each side.
    pub serial: u32,
    /// What it is, for the layer above.
    pub kind: u32,
    /// At most [`MAX_CUSTOM`].
    pub payload: Vec<u8>,
}

/// What stands before the content of a run of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// Of which device.
    pub device: DeviceIndex,
    /// The blocks, at most [`MAX_RUN`] long; zeros and other content without bytes may be longer.
    pub range: BlockRange,
    /// As of which round the content is.
    pub epoch: Epoch,
    /// Why it was sent now.
    pub class: Class,
}

/// What a side was waiting for when its deadline passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A connection, or a new one after a cut.
    Connection,
    /// The answer to hello or group.
    Handshake,
    /// The confirmation of a dirty list.
    Applied,
    /// The end of a round of local writes.
    Round,
    /// The pause of whoever writes.
    Quiesce,
    /// The confirmation of the token.
    Running,
    /// Blocks.
    Blocks,
    /// The store's or disk's confirmation.
    Durable,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connection => "a connection to the peer",
            Self::Handshake => "the peer's answer to the greeting",
            Self::Applied => "the peer to apply a dirty list",
            Self::Round => "local writes of a round to end",
            Self::Quiesce => "the writers here to pause",
            Self::Running => "the peer to take the token",
            Self::Blocks => "blocks",
            Self::Durable => "everything to be durable",
        })
    }
}

/// Why a move ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The two ends speak different versions.
    #[error("one end speaks version {ours} of a move, the other {theirs}; run the same release")]
    Version {
        /// Of whoever says this.
        ours: u16,
        /// Of the other.
        theirs: u16,
    },
    /// The peer talks about another move.
    #[error("no session {0} is known here; start a new move")]
    UnknownSession(SessionId),
    /// The destination has no such device, or of another size.
    #[error("device \"{device}\" does not fit: {what}")]
    Group {
        /// Which.
        device: String,
        /// What does not fit.
        what: String,
    },
    /// A block could not be read at the source.
    #[error("{device}: the source could not read {range:?}: {what}")]
    Read {
        /// Which.
        device: DeviceIndex,
        /// Where.
        range: BlockRange,
        /// The cause.
        what: String,
    },
    /// A block could not be stored at the destination.
    #[error("{device}: the destination could not store {range:?}: {what}")]
    Store {
        /// Which.
        device: DeviceIndex,
        /// Where.
        range: BlockRange,
        /// The cause.
        what: String,
    },
    /// Nobody answered in time.
    #[error("waited {after:?} for {what}, in vain")]
    Deadline {
        /// For what.
        what: Wait,
        /// How long.
        after: Duration,
    },
    /// Somebody writes faster than the line takes away, and may not be stopped.
    #[error("round {round}: {left} bytes are still dirty and rounds no longer help; allow hybrid")]
    Outpaced {
        /// How many rounds there were.
        round: u32,
        /// What is left.
        left: u64,
    },
    /// A side was told to stop.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// The source's content after this epoch died with it.
    #[error("{device}: the source lost what was written after {kept}; restore a generation")]
    Lost {
        /// Which.
        device: DeviceIndex,
        /// What it still has.
        kept: Epoch,
    },
    /// The peer said something that makes no sense.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
}
