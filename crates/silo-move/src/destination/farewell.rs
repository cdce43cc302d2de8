//! What a source is told that comes to a session which is over: at once, and always the same.
//!
//! Used by the server, for links to sessions that it knows to be over. What must hold (I1, I2): a
//! source hears that it may go only if all was durable here when the session ended; it hears that the
//! devices are its own only if they never became this host's by that session, and never will. Both
//! are facts for ever, whatever became of the devices since; a session that goes on is never here.

use crate::{peer::Link, wire};
use identity::HostName;
use silo_block::{
    block::BlockRange,
    rounds::Epoch,
    session::messages::{
        DeviceInfo, Held, Reason, SessionId, ToDestination, ToSource, Token, VERSION,
    },
};
use std::{
    collections::{HashMap, VecDeque},
    io,
    time::{Duration, Instant},
};

/// How long a peer has to close a link when all is said, and may pause while it still speaks.
pub(super) const LINGER: Duration = Duration::from_secs(2);
/// How long it may speak in all: a token with its state can be long, and the line slow.
const HEARING: Duration = Duration::from_secs(60);
/// Sessions that are remembered when they are over. Each is a few hundred bytes; the oldest goes.
const REMEMBERED: usize = 1024;

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Everything is here, and was durable: the source may go.
    Arrived {
        /// The token by which it runs.
        attempt: u32,
        /// The last epoch of the source, of each device of the group.
        epochs: Vec<Epoch>,
    },
    /// No token was taken, or the one that came was refused: any other will be.
    Never(Reason),
}

impl Outcome {
    /// The answer to a greeting and a group.
    fn words(&self, session: SessionId, group: &[DeviceInfo]) -> Vec<ToSource> {
        let hello = ToSource::Hello { version: VERSION, session };
        match self {
            Self::Arrived { attempt, epochs } => {
                let held = |epoch: &Epoch| Held { clock: *epoch, missing: Vec::new() };
                let devices = epochs.iter().map(held).collect();
                let have = ToSource::Have { devices, token: Token::Runs(*attempt) };
                vec![hello, have, ToSource::Durable { epochs: epochs.clone() }]
            }
            Self::Never(reason) => {
                // A source that does not know whether its token arrived sends it again when it hears
                // that it is awaited, and believes a refusal only.
                let none = |info: &DeviceInfo| Held {
                    clock: Epoch::BASE,
                    missing: vec![BlockRange::new(0, info.geometry.blocks())],
                };
                let devices = group.iter().map(none).collect();
                let have = ToSource::Have { devices, token: Token::Awaited };
                vec![hello, ToSource::Abort(reason.clone()), have]
            }
        }
    }

    /// Says it, and hears the source out.
    pub(super) fn tell(&self, mut link: Link, group: &[DeviceInfo]) {
        let said = self.converse(&mut link, group);
        tracing::info!(peer = link.peer, session = %link.session, outcome = ?self, ?said,
            "a source came to a session that is over");
        link.hangup().hang_up();
    }

    fn converse(&self, link: &mut Link, group: &[DeviceInfo]) -> io::Result<()> {
        let control = &mut link.control;
        for word in self.words(link.session, group) {
            wire::write_to_source(&mut control.outgoing, &word)?;
        }
        control.outgoing.flush()?;
        control.control.set_read_timeout(Some(LINGER));
        let begin = Instant::now();
        // Until it has heard; whoever has not comes again.
        while begin.elapsed() < HEARING {
            let Ok(frame) = control.incoming.read() else { break };
            let Ok(message) = wire::read_to_destination(&frame) else { break };
            if let (Some(ToDestination::Token { attempt, .. }), Self::Never(reason)) =
                (message, self)
            {
                let refused = ToSource::Refused { attempt, reason: reason.clone() };
                wire::write_to_source(&mut control.outgoing, &refused)?;
                control.outgoing.flush()?;
            }
        }
        Ok(())
    }
}

/// Sessions that are over, and whose they were: so many of the newest.
#[derive(Default)]
pub(super) struct Remembered {
    all: HashMap<SessionId, (Option<HostName>, Outcome)>,
    order: VecDeque<SessionId>,
}

impl Remembered {
    pub(super) fn add(&mut self, session: SessionId, owner: Option<HostName>, outcome: Outcome) {
        if self.all.insert(session, (owner, outcome)).is_none() {
            self.order.push_back(session);
        }
        while self.order.len() > REMEMBERED {
            self.order.pop_front().map(|oldest| self.all.remove(&oldest));
        }
    }

    pub(super) fn find(&self, session: SessionId) -> Option<&(Option<HostName>, Outcome)> {
        self.all.get(&session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_sessions_are_remembered_and_the_oldest_is_forgotten() {
        let id = |number: u16| {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&number.to_le_bytes());
            SessionId(bytes)
        };
        let outcome = Outcome::Arrived { attempt: 1, epochs: vec![Epoch(7)] };
        let mut remembered = Remembered::default();
        let more = REMEMBERED as u16 + 5;
        for number in (0..more).chain([more - 1]) {
            remembered.add(id(number), None, outcome.clone());
        }
        assert_eq!((remembered.all.len(), remembered.order.len()), (REMEMBERED, REMEMBERED));
        assert!(remembered.find(id(4)).is_none());
        assert_eq!(remembered.find(id(5)), Some(&(None, outcome)));
    }
}
