//! Post-copy that goes on over new connections: who may take a move up again, and what is still to
//! be sent. No I/O here: the ends feed in what they received.
//!
//! The source dials, for as long as the destination may need blocks: it knows where the destination
//! listens, and a destination that was restarted listens there again. It names the move by attempt and
//! session; who it is, mutual TLS has proved. What must hold:
//!
//! - Only the host that the machine came from takes its move up, and only that very move.
//! - A greeting is good once: an older connection of the same runner, or one of a runner that has been
//!   replaced, cannot push the newer out.
//! - The destination tells what it lacks, the source forgets what it believed. Listed blocks that
//!   arrive meanwhile are sent twice, which changes nothing.
//! - Lists of a hostile peer cost no more memory than the devices' own maps, and nothing outside the
//!   devices is looked at.

use super::{
    lists::Lists,
    messages::{ResumeAnswer, ResumeRequest, Standing},
    protocol::Frame,
};
use identity::HostName;
use silo::block::BlockSet;

/// Runners of the source that were replaced, at most; the oldest are forgotten.
const LIVES: usize = 64;

/// Why a source may not take a move up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stranger {
    /// Another machine.
    #[error("it asks for machine \"{0}\"")]
    Machine(String),
    /// Not this move.
    #[error(
        "it names attempt {attempt} of session {session}, which is not the one that is open here"
    )]
    Move {
        /// The attempt that it named.
        attempt: u64,
        /// The session that it named.
        session: String,
    },
    /// Not the host that the machine came from.
    #[error("it is host \"{found}\", the machine came from \"{wanted}\"")]
    Host {
        /// Who it is, or says that it is.
        found: String,
        /// Who it must be.
        wanted: String,
    },
    /// An older connection, or a repeated greeting.
    #[error("its greeting (number {0}) is older than the connection that is open")]
    Stale(u32),
}

/// The destination's side: knows its source.
#[derive(Clone, Debug)]
pub struct Greeter {
    machine: String,
    from: HostName,
    attempt: u64,
    session: String,
    /// The runners that have greeted, the newest last.
    lives: Vec<u64>,
    serial: u32,
}

impl Greeter {
    /// For a machine that came `from` there by this attempt and session.
    #[must_use]
    pub const fn new(machine: String, from: HostName, attempt: u64, session: String) -> Self {
        Self { machine, from, attempt, session, lives: Vec::new(), serial: 0 }
    }

    /// Whether a greeting names the move that this one is for.
    #[must_use]
    pub fn knows(&self, request: &ResumeRequest) -> bool {
        request.session == self.session && request.attempt == self.attempt
    }

    /// Whether this greeting takes the move up. `proved`: the name in the peer's certificate; none in
    /// plaintext, where the name that it claims must do.
    ///
    /// # Errors
    /// With what is wrong; then nothing has changed.
    pub fn check(
        &mut self,
        request: &ResumeRequest,
        proved: Option<&HostName>,
    ) -> Result<(), Stranger> {
        if request.machine != self.machine {
            return Err(Stranger::Machine(request.machine.clone()));
        }
        if !self.knows(request) {
            let (attempt, session) = (request.attempt, request.session.clone());
            return Err(Stranger::Move { attempt, session });
        }
        let claimed = request.host.as_str();
        let found = proved.map_or(claimed, HostName::as_str);
        if found != self.from.as_str() || claimed != self.from.as_str() {
            let found = if found == self.from.as_str() { claimed } else { found };
            let wanted = self.from.as_str().to_owned();
            return Err(Stranger::Host { found: found.to_owned(), wanted });
        }
        let newest = self.lives.last() == Some(&request.life);
        let replaced = !newest && self.lives.contains(&request.life);
        if replaced || (newest && request.serial <= self.serial) {
            return Err(Stranger::Stale(request.serial));
        }
        if !newest {
            if self.lives.len() == LIVES {
                self.lives.remove(0);
            }
            self.lives.push(request.life);
        }
        self.serial = request.serial;
        Ok(())
    }
}

/// The source's side: collects the destination's answer.
#[derive(Debug)]
pub struct Roll {
    missing: Lists,
    answer: Option<ResumeAnswer>,
}

/// What an answer came to.
#[derive(Debug)]
pub enum Answered {
    /// More frames belong to it.
    Goes,
    /// The destination lacks these blocks; `nonce` is to be given back.
    Missing {
        /// For each device.
        missing: Vec<BlockSet>,
        /// Ends the lists.
        nonce: u64,
        /// The answer with its reports.
        answer: ResumeAnswer,
    },
    /// Nothing is to be sent.
    Over(ResumeAnswer),
}

impl Roll {
    /// For devices of so many blocks.
    #[must_use]
    pub fn new(blocks: impl IntoIterator<Item = u64>) -> Self {
        Self { missing: Lists::new(blocks), answer: None }
    }

    /// Takes the next frame.
    ///
    /// # Errors
    /// If the destination breaks the rules: the connection is of no use.
    pub fn take(&mut self, frame: Frame) -> Result<Answered, String> {
        match (frame, &self.answer) {
            (Frame::Resumed(json), None) => {
                let answer: ResumeAnswer = serde_json::from_slice(&json)
                    .map_err(|e| format!("its answer cannot be read: {e}"))?;
                if answer.standing != Standing::Missing {
                    return Ok(Answered::Over(answer));
                }
                self.answer = Some(answer);
                Ok(Answered::Goes)
            }
            (Frame::Missing { device, ranges }, Some(_)) => {
                self.missing.take(device, &ranges)?;
                Ok(Answered::Goes)
            }
            (Frame::RoundEnd(nonce), Some(answer)) => {
                let answer = answer.clone();
                let missing = std::mem::replace(&mut self.missing, Lists::new([]));
                Ok(Answered::Missing { missing: missing.into_sets(), nonce, answer })
            }
            (Frame::Unknown(_), _) => Ok(Answered::Goes),
            (other, _) => Err(format!("it answered with {}", name(&other))),
        }
    }
}

fn name(frame: &Frame) -> String {
    let text = format!("{frame:?}");
    text.split(['(', ' ', '{']).next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::protocol::DeviceNumber;
    use proptest::prelude::*;
    use silo::block::BlockRange;

    fn host(name: &str) -> HostName {
        HostName::new(name).unwrap()
    }

    fn greeter() -> Greeter {
        Greeter::new("redis".into(), host("a"), 7, "5e55".into())
    }

    fn request(life: u64, serial: u32) -> ResumeRequest {
        ResumeRequest {
            machine: "redis".into(),
            host: "a".into(),
            attempt: 7,
            session: "5e55".into(),
            life,
            serial,
        }
    }

    #[test]
    fn hop_check_12_the_source_of_the_move_is_let_in_and_nobody_else() {
        let mut greeter = greeter();
        let (a, c) = (host("a"), host("c"));
        let mut check = |request: &ResumeRequest, proved| greeter.check(request, proved);
        let good = request(1, 1);
        let wrong = [
            ResumeRequest { machine: "other".into(), ..good.clone() },
            ResumeRequest { attempt: 8, ..good.clone() },
            ResumeRequest { session: "0bad".into(), ..good.clone() },
            ResumeRequest { session: String::new(), ..good.clone() },
            ResumeRequest { host: "c".into(), ..good.clone() },
        ];
        for wrong in &wrong {
            check(wrong, Some(&a)).unwrap_err();
            check(wrong, None).unwrap_err();
        }
        let stranger = check(&good, Some(&c)).unwrap_err();
        assert!(stranger.to_string().contains("\"c\""), "{stranger}");
        // None of that has used up the greeting.
        check(&good, Some(&a)).unwrap();
    }

    #[test]
    fn a_greeting_is_good_once_and_an_older_runners_never_again() {
        let mut greeter = greeter();
        let a = host("a");
        let mut check = |life, serial| greeter.check(&request(life, serial), Some(&a));
        check(1, 1).unwrap();
        assert_eq!(check(1, 1), Err(Stranger::Stale(1)), "a replay");
        check(1, 3).unwrap();
        assert_eq!(check(1, 2), Err(Stranger::Stale(2)), "one that was overtaken");
        check(2, 1).unwrap();
        assert_eq!(check(1, 4), Err(Stranger::Stale(4)), "a runner that was replaced");
        check(2, 2).unwrap();
    }

    fn resumed(standing: Standing) -> Frame {
        Frame::Resumed(serde_json::to_vec(&ResumeAnswer::of(standing, "")).unwrap())
    }

    fn list(device: u8, ranges: &[(u64, u64)]) -> Frame {
        let ranges = ranges.iter().map(|(start, count)| BlockRange::new(*start, *count)).collect();
        Frame::Missing { device: DeviceNumber(device), ranges }
    }

    #[test]
    fn lists_come_together_and_end_with_their_nonce() {
        let mut roll = Roll::new([100, 10]);
        assert!(matches!(roll.take(resumed(Standing::Missing)).unwrap(), Answered::Goes));
        roll.take(list(0, &[(5, 2), (99, 1)])).unwrap();
        roll.take(list(1, &[(0, 10)])).unwrap();
        let Answered::Missing { missing, nonce, .. } = roll.take(Frame::RoundEnd(9)).unwrap()
        else {
            panic!("the lists have not ended")
        };
        assert_eq!((missing[0].len(), missing[1].len(), nonce), (3, 10, 9));
    }

    #[test]
    fn an_answer_without_lists_ends_at_once() {
        for standing in [Standing::Durable, Standing::Refused, Standing::Unknown] {
            let taken = Roll::new([100]).take(resumed(standing)).unwrap();
            assert!(matches!(taken, Answered::Over(answer) if answer.standing == standing));
        }
    }

    #[test]
    fn hop_check_11_lists_of_another_size_too_long_or_out_of_order_are_refused() {
        let begun = || {
            let mut roll = Roll::new([100, 10]);
            roll.take(resumed(Standing::Missing)).unwrap();
            roll
        };
        assert!(begun().take(list(0, &[(99, 2)])).unwrap_err().contains("which has 100"));
        assert!(begun().take(list(2, &[(0, 1)])).unwrap_err().contains("device number 2"));
        let mut many = begun();
        many.take(list(0, &[(0, 100)])).unwrap();
        assert!(many.take(list(0, &[(0, 50)])).unwrap_err().contains("more blocks"));
        assert!(begun().take(resumed(Standing::Missing)).is_err(), "twice");
        assert!(Roll::new([1]).take(list(0, &[(0, 1)])).is_err(), "before the answer");
        assert!(Roll::new([1]).take(Frame::RoundEnd(0)).is_err());
        assert!(Roll::new([1]).take(Frame::Resumed(b"{".to_vec())).is_err());
        let error = begun().take(Frame::Abort("no".into())).unwrap_err();
        assert!(error.contains("Abort"), "{error}");
    }

    proptest! {
        #[test]
        fn no_list_panics_or_names_a_block_that_is_not_there(
            lists in proptest::collection::vec((0u8..4, 0u64..300, 1u64..300), 0..20),
        ) {
            let mut roll = Roll::new([100, 10]);
            roll.take(resumed(Standing::Missing)).unwrap();
            for (device, start, count) in lists {
                if roll.take(list(device, &[(start, count)])).is_err() {
                    return Ok(());
                }
            }
            let Answered::Missing { missing, .. } = roll.take(Frame::RoundEnd(0)).unwrap() else {
                panic!("the lists have not ended")
            };
            prop_assert!(missing[0].len() <= 100 && missing[1].len() <= 10);
        }
    }
}
