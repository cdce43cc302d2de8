//! What the [`agent`](crate::agent) in the guest and its host say to each other.
//!
//! Over the virtio-serial port [`PORT_NAME`], one JSON object a line ([`mod@line`]). Both ends drop out
//! at any byte: the runner dies or the machine moves, and the port tells the other end late or not
//! at all. So a conversation begins with a *hello*:
//!
//! ```text
//! host                                    guest
//!  "\n"  {"type":"hello","version":1,"nonce":N}  →      ends whatever the last host had asked for
//!        ← … rest of an old line, old answers … "\n"    (the host drops all before its nonce)
//!        ← {"type":"hello","version":1,"nonce":N,…}
//!  {"type":"ping","id":1}                        →
//!        ← {"type":"done","id":1}
//! ```
//!
//! * Every request carries an id that the host chooses, unique within the conversation; every
//!   request gets exactly one final answer with that id ([`GuestMessage::is_final`]), and `exec`
//!   gets any number of `output` before it. Answers come in any order.
//! * A message of an unknown type is kept by name ([`Decoded::Unknown`]): the agent answers it with
//!   [`FailureCode::Unsupported`], the host ignores it. Unknown fields are ignored. So a newer end
//!   can talk to an older one; a change that breaks this raises [`PROTOCOL_VERSION`].
//! * An agent that starts says `started`: a host that talked to the one before begins anew.
//! * `exec` belongs to the conversation: when that ends, its processes are killed.
//!
//! Used by the [`agent`](crate::agent) in the guest and by drafter's guest channel on the host.

pub mod line;
mod message;

pub use message::{
    Decoded, Entry, EntryState, ExecRequest, ExitStatus, Failure, FailureCode, GuestMessage,
    HostMessage, NewIdentity, ProbeKind, ProtocolError, Stream,
};

/// The version that both ends name in their hello; ends of different versions do not talk.
pub const PROTOCOL_VERSION: u32 = 1;

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "drafter.agent";

/// Longest line in bytes, with its newline.
pub const MAX_LINE: usize = 64 * 1024;

/// Most bytes of output in one message: its base64 text stays well below [`MAX_LINE`].
pub const MAX_OUTPUT: usize = 16 * 1024;

/// How many random bytes a host gives to a resumed guest: at least, at most.
pub const ENTROPY_BYTES: std::ops::RangeInclusive<usize> = 32..=1024;
