//! The first bytes on each connection, from the side that opened it.

use super::{VERSION, WireError, array};
use silo_block::session::messages::SessionId;
use std::io::Read;

const MAGIC: [u8; 4] = *b"SILO";
/// Length on the wire.
const LENGTH: usize = 40;
/// Data connections of a session at most.
pub const MAX_DATA: u8 = 32;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Messages both ways.
    Control,
    /// Blocks, many at a time; its number.
    Data(u8),
    /// Demands one way and their blocks the other way: never behind bulk.
    Demand,
    /// Content by hash, asked for by the side that opened the connection. Belongs to no session.
    Fetch,
}

/// The first bytes on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// What for.
    pub role: Role,
    /// How many data connections the session has: 1 to 32, 0 for [`Role::Fetch`].
    pub data: u8,
    /// Which session.
    pub session: SessionId,
    /// Counts the times that the session connected: connections of one time belong together.
    pub attempt: u64,
}

impl Preamble {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        let (role, number) = match self.role {
            Role::Control => (0, 0),
            Role::Data(number) => (1, number),
            Role::Demand => (2, 0),
            Role::Fetch => (3, 0),
        };
        (bytes[6], bytes[7], bytes[8]) = (role, number, self.data);
        bytes[16..32].copy_from_slice(&self.session.0);
        bytes[32..40].copy_from_slice(&self.attempt.to_le_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// Another protocol or version, or numbers out of range.
    pub fn read(from: &mut impl Read) -> Result<Self, WireError> {
        let mut bytes = [0; LENGTH];
        from.read_exact(&mut bytes)?;
        let magic = array(&bytes[0..4]);
        if magic != MAGIC {
            return Err(WireError::Foreign(magic));
        }
        let theirs = u16::from_le_bytes(array(&bytes[4..6]));
        if theirs != VERSION {
            return Err(WireError::Version { theirs });
        }
        let (number, data) = (bytes[7], bytes[8]);
        let role = match bytes[6] {
            0 => Role::Control,
            1 => Role::Data(number),
            2 => Role::Demand,
            3 => Role::Fetch,
            other => return Err(WireError::Invalid(format!("connection role {other}"))),
        };
        let fits = match role {
            Role::Fetch => data == 0,
            Role::Data(number) => data <= MAX_DATA && number < data,
            Role::Control | Role::Demand => (1..=MAX_DATA).contains(&data),
        };
        if !fits {
            let text = format!("connection {number} of {data} for {role:?}");
            return Err(WireError::Invalid(text));
        }
        let session = SessionId(array(&bytes[16..32]));
        Ok(Self { role, data, session, attempt: u64::from_le_bytes(array(&bytes[32..40])) })
    }
}

/// For fuzzing: what is read is written back the same.
pub fn fuzz_preamble(mut bytes: &[u8]) {
    if let Ok(preamble) = Preamble::read(&mut bytes) {
        let again = Preamble::read(&mut &preamble.encode()[..]);
        assert!(again.is_ok_and(|again| again == preamble));
    }
}
