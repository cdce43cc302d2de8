//! One connection to a server, shared by all who ask.
//!
//! There is no thread of its own. Whoever waits for an answer may hold the *turn* to receive; it
//! reads headers until its own answers are there. A header of somebody else's answer goes to them,
//! and the turn with it, so that each reads its data straight into its own buffer, and somebody who
//! is alone is woken by nobody but the kernel.
//!
//! ```text
//!  send (output lock) ─▶ wait: turn free? take it ─▶ header: mine ─▶ data into my buffer ─▶ done?
//!                          ▲      │ no                 │ another's                           │
//!                          └──────┴── sleep ◀── give header and turn to its owner            ▼
//!                                                              turn to anybody who waits, or free
//! ```
//!
//! What must hold: whoever has the turn is on its way to read, never asleep or sending; all requests of one
//! call leave under one hold of the output lock, so that nobody waits to send while answers to
//! what it sent already pile up.

use super::replies::{Piece, Replies};
use crate::nbd::{
    line::{Input, Line, Output},
    protocol::{Command, Reply, Request},
};
use std::{
    collections::HashMap,
    io::{self, IoSlice},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Free,
    Taken,
}

/// What somebody who waits was given.
#[derive(Default)]
enum Gift {
    #[default]
    Nothing,
    /// The turn.
    Turn,
    /// The turn, and a header that was read for them.
    Header(Reply),
}

/// Somebody who waits for answers.
#[derive(Default)]
struct Waiter {
    /// Its requests are out: it may be given the turn. (Who is still sending would not read.)
    sent: AtomicBool,
    gift: Mutex<Gift>,
    signal: Condvar,
}

struct State {
    turn: Turn,
    /// Who waits for the answer to which cookie.
    waiting: HashMap<u64, Arc<Waiter>>,
    /// When somebody began to wait, or something came.
    heard: Instant,
    /// Why nothing more comes.
    broken: Option<String>,
}

/// See the module.
pub(super) struct Link {
    line: Line,
    output: Mutex<Output>,
    input: Mutex<Replies<Input>>,
    state: Mutex<State>,
    cookie: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub(super) fn new(line: Line, input: Input, output: Output) -> Self {
        Self {
            line,
            output: Mutex::new(output),
            input: Mutex::new(Replies::new(input)),
            state: Mutex::new(State {
                turn: Turn::Free,
                waiting: HashMap::new(),
                heard: Instant::now(),
                broken: None,
            }),
            cookie: AtomicU64::new(1),
        }
    }

    /// Does all of `pieces`; what the server says to each is in it afterwards.
    ///
    /// # Errors
    /// If the connection is lost. Then nothing is known about any of them.
    pub(super) fn call(&self, pieces: &mut [Piece<'_>]) -> io::Result<()> {
        let count = pieces.len() as u64;
        let first = self.cookie.fetch_add(count, Ordering::Relaxed);
        let waiter = Arc::new(Waiter::default());
        {
            let mut state = lock(&self.state);
            check(&state)?;
            if state.waiting.is_empty() {
                state.heard = Instant::now();
            }
            state.waiting.extend((first..first + count).map(|cookie| (cookie, waiter.clone())));
        }
        for (piece, cookie) in pieces.iter_mut().zip(first..) {
            piece.request.cookie = cookie;
        }
        let done = self.send(pieces).and_then(|()| {
            waiter.sent.store(true, Ordering::Release);
            self.receive(first, &waiter, pieces)
        });
        if let Err(error) = done {
            self.break_off(&error);
            // What the first one to notice said: later errors only follow from it.
            return check(&lock(&self.state)).and(Err(error));
        }
        Ok(())
    }

    fn send(&self, pieces: &[Piece<'_>]) -> io::Result<()> {
        let heads: Vec<_> = pieces.iter().map(|piece| piece.request.encode()).collect();
        let mut parts = Vec::with_capacity(heads.len() * 2);
        for (head, piece) in heads.iter().zip(pieces) {
            parts.push(IoSlice::new(head));
            if !piece.payload.is_empty() {
                parts.push(IoSlice::new(piece.payload));
            }
        }
        lock(&self.output).send(&mut parts)
    }

    fn receive(&self, first: u64, waiter: &Waiter, pieces: &mut [Piece<'_>]) -> io::Result<()> {
        let mut left = pieces.len();
        loop {
            let mut header = self.wait_for_turn(waiter)?;
            let mut input = lock(&self.input);
            loop {
                let reply = match header.take() {
                    Some(reply) => reply,
                    None => input.next()?,
                };
                let index = reply.cookie().wrapping_sub(first);
                let mine = usize::try_from(index).ok().and_then(|index| pieces.get_mut(index));
                let Some(piece) = mine else {
                    drop(input);
                    self.hand_over(reply)?;
                    break;
                };
                if piece.is_done() {
                    return Err(twice());
                }
                input.take(reply, piece)?;
                if !piece.is_done() {
                    continue;
                }
                left -= 1;
                {
                    let mut state = lock(&self.state);
                    state.waiting.remove(&reply.cookie());
                    state.heard = Instant::now();
                }
                if left == 0 {
                    let next = input.buffered();
                    drop(input);
                    return match next {
                        Some(reply) => self.hand_over(reply),
                        None => {
                            self.pass_turn();
                            Ok(())
                        }
                    };
                }
            }
        }
    }

    /// Sleeps until it has the turn.
    fn wait_for_turn(&self, waiter: &Waiter) -> io::Result<Option<Reply>> {
        {
            let mut state = lock(&self.state);
            check(&state)?;
            if state.turn == Turn::Free {
                state.turn = Turn::Taken;
                return Ok(None);
            }
        }
        let mut gift = lock(&waiter.gift);
        loop {
            match std::mem::take(&mut *gift) {
                Gift::Turn => {
                    drop(gift);
                    // It may be the end that woke us.
                    return check(&lock(&self.state)).map(|()| None);
                }
                Gift::Header(reply) => return Ok(Some(reply)),
                Gift::Nothing => {
                    gift = waiter.signal.wait(gift).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Gives a header, and the turn, to whom it belongs.
    fn hand_over(&self, reply: Reply) -> io::Result<()> {
        let owner = lock(&self.state).waiting.get(&reply.cookie()).cloned();
        give(&*owner.ok_or_else(twice)?, Gift::Header(reply));
        Ok(())
    }

    /// Gives the turn to anybody who waits. Who has not sent all yet will find it free, or get it
    /// from whoever takes it meanwhile.
    fn pass_turn(&self) {
        let mut state = lock(&self.state);
        let ready = |waiter: &&Arc<Waiter>| waiter.sent.load(Ordering::Acquire);
        match state.waiting.values().find(ready).cloned() {
            Some(next) => {
                drop(state);
                give(&next, Gift::Turn);
            }
            None => state.turn = Turn::Free,
        }
    }

    /// Nothing more comes: everybody who waits learns it.
    fn break_off(&self, error: &io::Error) {
        let mut state = lock(&self.state);
        state.broken.get_or_insert_with(|| error.to_string());
        // The turn is nobody's, and whoever wakes finds out why.
        state.turn = Turn::Free;
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        for waiter in waiting.values() {
            give(waiter, Gift::Turn);
        }
        self.line.hang_up();
    }

    /// Ends the connection; whoever waits gets an error.
    pub(super) fn close(&self, why: &str) {
        self.break_off(&io::Error::other(why.to_owned()));
    }

    /// As [`Link::close`], if the server has owed an answer for so long.
    pub(super) fn close_if_silent(&self, limit: Duration, why: &str) {
        let state = lock(&self.state);
        let silent = !state.waiting.is_empty() && state.heard.elapsed() >= limit;
        drop(state);
        if silent {
            self.close(why);
        }
    }

    /// Says goodbye, if nobody is in the middle of saying something.
    pub(super) fn say_goodbye(&self) {
        if let Ok(mut output) = self.output.try_lock() {
            let request =
                Request { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, length: 0 };
            // A courtesy: the server may be gone.
            let _ = output.send(&mut [IoSlice::new(&request.encode())]);
            output.say_goodbye();
        }
    }
}

fn give(waiter: &Waiter, what: Gift) {
    *lock(&waiter.gift) = what;
    waiter.signal.notify_one();
}

fn check(state: &State) -> io::Result<()> {
    match &state.broken {
        None => Ok(()),
        Some(why) => Err(io::Error::new(io::ErrorKind::NotConnected, why.clone())),
    }
}

fn twice() -> io::Error {
    let message = "the server answered what was not asked, or twice";
    io::Error::new(io::ErrorKind::InvalidData, message)
}
