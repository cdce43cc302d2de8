//! Which preshared key this end uses with each other one in the kernel's tunnel, and how the two change it
//! together. No I/O: notes go in and out, time is an argument, and whoever calls ([`super`]) writes down what
//! has changed, then tells the kernel, and only then sends what is to be said.
//!
//! Of two ends the one with the lower overlay address *leads*. Notes may be lost, doubled and overtake each
//! other; the leader says its last one again until it is answered.
//!
//! ```text
//!  leader                                        follower
//!  Settled ── offer {generation, key} ─────────▶  makes a key of both, keeps the old one
//!  Offering ◀── answer {offer, key, proof} ─────
//!  (writes the next key down)
//!  Committing ── commit {generation, proof} ───▶  writes it down, uses it from now on
//!     ▲   │  ◀── at {generation, proof} ────────
//!     │   └─ uses it too: Settled
//!     └─ no answer for long: one key, then the other, [`TURN`] each
//! ```
//!
//! - Until the follower has said that it has changed, the leader does not know which key it uses. A session
//!   lives for 180 s and is renewed after 120, and a handshake that fails is tried again after 5 s: so both
//!   may differ for a moment, and a leader that is not answered tries both keys in turn. At least one
//!   handshake falls into each turn, and so the two find each other without a word, in less than a minute.
//! - A `commit` of the key that is in use asks whether the other end has it, too: after each start and each
//!   new connection, and every half minute. A follower that says that it does not know the key (its folder is
//!   older) is offered a new one.
//! - What a follower says of a `commit` names it: an answer that was late changes nothing.
//! - The schedules of both ends count: a follower whose time has come asks for a change (`want`).
//! - Two that have never met have no preshared key until they have agreed, as WireGuard without any. A pair
//!   is known by both static keys: who has another one begins anew.

use super::pair_key::{self, End, Key, Own, Proof, Saved};
use conduit_wg::{PrivateKey, PublicKey};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

/// A note that is not answered is said again after the first of these, and then ever later, to the second.
const AGAIN: (u64, u64) = (1000, 30_000);
/// How often the leader asks whether both have the same key.
const CHECK: u64 = 30_000;
/// How long a leader that is not answered uses one key before it tries the other: two handshakes' time.
const TURN: u64 = 10_000;
/// A follower leaves it to the leader for this long to see that the time has come.
const PATIENCE: u64 = 30_000;
/// No pair changes its key so often; a larger number is no generation.
const GENERATIONS: u64 = 1 << 48;

/// What two ends tell each other; the edge passes it on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "note", rename_all = "kebab-case")]
pub enum Note {
    /// Leader: let us have a new key.
    Offer {
        /// Its number.
        generation: u64,
        /// A public key for this once.
        key: PublicKey,
    },
    /// Follower: I have made it.
    Answer {
        /// What the offer said.
        offer: PublicKey,
        /// A public key for this once.
        key: PublicKey,
        /// That it has it.
        proof: Proof,
    },
    /// Leader: use it. Or, of the one in use: do you?
    Commit {
        /// Its number.
        generation: u64,
        /// That it has it.
        proof: Proof,
    },
    /// Follower: this is the key that I use.
    At {
        /// Its number; 0 is none.
        generation: u64,
        /// That it has it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        proof: Option<Proof>,
        /// What the commit said that this answers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<Proof>,
    },
    /// Follower: the time of this key is over.
    Want {
        /// Its number.
        generation: u64,
    },
}

/// When something is said again.
#[derive(Clone, Copy, Debug, Default)]
struct Again {
    at: u64,
    wait: u64,
}

impl Again {
    /// Whether it is time; counted as said if so.
    fn is_due(&mut self, now: u64) -> bool {
        // A clock that was set back must not silence it.
        if now < self.at && self.at - now <= AGAIN.1.max(CHECK) {
            return false;
        }
        self.wait = (self.wait * 2).clamp(AGAIN.0, AGAIN.1);
        self.at = now + self.wait;
        true
    }

    fn now() -> Self {
        Self::default()
    }

    fn in_time(now: u64, wait: u64) -> Self {
        Self { at: now + wait, wait: 0 }
    }
}

/// What a leader is doing.
enum Step {
    /// Nothing; whether the follower has said that it has the key, too.
    Settled { sure: bool },
    /// It has offered a key.
    Offering { generation: u64, once: PrivateKey },
    /// It has told the follower to use it.
    Committing { next: Key, since: u64 },
}

/// What a follower remembers.
#[derive(Default)]
struct Follows {
    /// What it was offered last, and has answered.
    answered: Option<(PublicKey, Note, Key)>,
    /// The leader has spoken since the two greeted each other.
    heard: bool,
}

enum Role {
    Leads(Step),
    Follows(Follows),
}

/// This end and another one.
struct Pair {
    peer: PublicKey,
    current: Option<Key>,
    role: Role,
    again: Again,
    /// The key is to be changed before its time.
    asked: bool,
    /// Not written down yet.
    unsaved: bool,
}

/// How a pair is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PairState {
    /// Number of its key; 0 if it has none yet.
    pub(crate) generation: u64,
    /// Since when it has it, in milliseconds since 1970.
    pub(crate) since: Option<u64>,
    /// A change is under way, or was not confirmed.
    pub(crate) changing: bool,
}

/// What is to be done with a pair's file.
pub(crate) enum File {
    Write(Box<Saved>),
    Remove,
}

/// All pairs that this end is one of.
pub(crate) struct Pairs {
    own: Ipv4Addr,
    fixed: PrivateKey,
    public: PublicKey,
    /// How long a key is used.
    every: Option<u64>,
    pairs: BTreeMap<Ipv4Addr, Pair>,
    /// Files of pairs that are no more.
    gone: Vec<Ipv4Addr>,
    out: Vec<(Ipv4Addr, Note)>,
    changes: u64,
}

impl Pairs {
    /// No pairs yet, for the end at `own` that the tunnel knows by `fixed`. Keys are changed after `every`.
    pub(crate) fn new(own: Ipv4Addr, fixed: PrivateKey, every: Option<Duration>) -> Self {
        let every = every.map(|e| u64::try_from(e.as_millis()).unwrap_or(u64::MAX).max(1));
        let public = fixed.public();
        let (pairs, gone, out) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { own, fixed, public, every, pairs, gone, out, changes: 0 }
    }

    fn lead(&self, peer: Ipv4Addr) -> bool {
        self.own < peer
    }

    /// Takes up what was written down of a pair; nothing if one of the two has another static key by now.
    pub(crate) fn restore(&mut self, at: Ipv4Addr, saved: Saved, now: u64) {
        if saved.own != self.public {
            return;
        }
        let mut pair = Pair::new(saved.peer, self.lead(at));
        pair.current = saved.current;
        if let (Role::Leads(step), Some(next)) = (&mut pair.role, saved.next) {
            *step = Step::Committing { next, since: now };
        }
        self.pairs.insert(at, pair);
    }

    /// These are the other ends from now on, with their static keys.
    pub(crate) fn set_ends(&mut self, ends: impl Iterator<Item = (Ipv4Addr, PublicKey)>) {
        let mut before = std::mem::take(&mut self.pairs);
        for (at, peer) in ends.filter(|(at, _)| *at != self.own) {
            let known = before.remove(&at).filter(|pair| pair.peer == peer);
            let pair = known.unwrap_or_else(|| Pair::new(peer, self.own < at));
            self.pairs.insert(at, pair);
        }
        self.gone.extend(before.into_keys());
    }

    /// The preshared key to use with an end now.
    pub(crate) fn secret(&self, at: Ipv4Addr, now: u64) -> Option<pair_key::Secret> {
        let pair = self.pairs.get(&at)?;
        let current = pair.current.as_ref().map(|key| key.secret);
        match &pair.role {
            Role::Leads(Step::Committing { next, since }) => {
                let turn = now.saturating_sub(*since) / TURN;
                if turn % 2 == 1 { Some(next.secret) } else { current }
            }
            _ => current,
        }
    }

    /// How each pair is.
    pub(crate) fn states(&self) -> impl Iterator<Item = (Ipv4Addr, PublicKey, PairState)> {
        self.pairs.iter().map(|(at, pair)| {
            let changing = match &pair.role {
                Role::Leads(Step::Settled { sure }) => !sure,
                Role::Leads(_) => true,
                // Whether what it has answered will be used is the leader's business.
                Role::Follows(_) => pair.asked,
            };
            let (generation, since) = (pair.generation(), pair.current.as_ref().map(|k| k.since));
            (*at, pair.peer, PairState { generation, since, changing })
        })
    }

    /// How often keys have changed since this process began.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// Every pair's key is to be changed now.
    pub(crate) fn rotate(&mut self) {
        for pair in self.pairs.values_mut() {
            (pair.asked, pair.again) = (true, Again::now());
        }
    }

    /// The way to an end (to all, if none is named) is new, or this process is: both tell each other where
    /// they are.
    pub(crate) fn greet(&mut self, at: Option<Ipv4Addr>) {
        for (_, pair) in self.pairs.iter_mut().filter(|(to, _)| at.is_none_or(|at| at == **to)) {
            pair.again = Again::now();
            match &mut pair.role {
                Role::Leads(Step::Settled { sure }) => *sure = false,
                Role::Leads(_) => {}
                Role::Follows(follows) => follows.heard = false,
            }
        }
    }

    /// Time passes: what was not answered is said again, what is over is changed.
    pub(crate) fn tick(&mut self, now: u64) {
        let ends: Vec<_> = self.pairs.keys().copied().collect();
        for at in ends {
            self.look(at, now);
        }
    }

    fn look(&mut self, at: Ipv4Addr, now: u64) {
        let every = self.every;
        let Some(pair) = self.pairs.get_mut(&at) else { return };
        let over = |more: u64| {
            let key = pair.current.as_ref();
            key.zip(every).is_some_and(|(key, every)| {
                now.saturating_sub(key.since) >= every.saturating_add(more)
            })
        };
        match &pair.role {
            Role::Leads(Step::Settled { .. })
                if pair.current.is_none() || pair.asked || over(0) =>
            {
                self.offer(at, 0);
                self.say_again(at, now);
            }
            Role::Leads(_) => self.say_again(at, now),
            Role::Follows(follows) => {
                let patience = every.map_or(PATIENCE, |every| PATIENCE.min(every));
                let (greets, wants) = (!follows.heard, pair.asked || over(patience));
                if (greets || wants) && pair.again.is_due(now) {
                    let want = Note::Want { generation: pair.generation() };
                    self.out.extend(greets.then(|| (at, pair.at(None))));
                    self.out.extend(wants.then_some((at, want)));
                }
            }
        }
    }

    /// A leader says what it has said last, if it is time.
    fn say_again(&mut self, at: Ipv4Addr, now: u64) {
        let Some(pair) = self.pairs.get_mut(&at) else { return };
        if !pair.again.is_due(now) {
            return;
        }
        let note = match (&pair.role, &pair.current) {
            (Role::Leads(Step::Offering { generation, once }), _) => {
                Some(Note::Offer { generation: *generation, key: once.public() })
            }
            (Role::Leads(Step::Committing { next, .. }), _) => Some(next.commit()),
            (Role::Leads(Step::Settled { sure }), Some(current)) => {
                if *sure {
                    pair.again = Again::in_time(now, CHECK);
                }
                Some(current.commit())
            }
            _ => None,
        };
        self.out.extend(note.map(|note| (at, note)));
    }

    /// A leader begins a change, to a key of a number that is larger than both ends'.
    fn offer(&mut self, at: Ipv4Addr, theirs: u64) {
        let Some(pair) = self.pairs.get_mut(&at) else { return };
        let last = match &pair.role {
            Role::Leads(Step::Offering { generation, .. }) => *generation,
            Role::Leads(Step::Committing { next, .. }) => next.generation,
            _ => 0,
        };
        let generation = pair.generation().max(theirs).max(last) + 1;
        match PrivateKey::generate() {
            Ok(once) => {
                pair.unsaved |= matches!(pair.role, Role::Leads(Step::Committing { .. }));
                pair.role = Role::Leads(Step::Offering { generation, once });
                pair.again = Again::now();
            }
            // Tried again at the next tick.
            Err(error) => tracing::warn!(%error, peer = %at, "no new key"),
        }
    }

    /// An end says something.
    pub(crate) fn hear(&mut self, from: Ipv4Addr, note: &Note, now: u64) {
        let fine = match note {
            Note::Offer { generation, .. }
            | Note::Commit { generation, .. }
            | Note::At { generation, .. }
            | Note::Want { generation } => *generation < GENERATIONS,
            Note::Answer { .. } => true,
        };
        let Some(pair) = self.pairs.get(&from).filter(|_| fine) else { return };
        match &pair.role {
            Role::Leads(_) => self.hear_follower(from, note, now),
            Role::Follows(_) => self.hear_leader(from, note, now),
        }
    }

    fn hear_leader(&mut self, from: Ipv4Addr, note: &Note, now: u64) {
        let Some(pair) = self.pairs.get_mut(&from) else { return };
        let Role::Follows(follows) = &mut pair.role else { return };
        follows.heard = true;
        match note {
            Note::Offer { generation, key } => {
                let known = follows.answered.as_ref().filter(|(offer, ..)| offer == key);
                if let Some((_, answer, _)) = known {
                    self.out.push((from, answer.clone()));
                } else if *generation <= pair.generation() {
                    self.out.push((from, pair.at(None)));
                } else {
                    self.answer(from, (*generation, *key), now);
                }
            }
            Note::Commit { proof, .. } => {
                let answered = follows.answered.as_ref().is_some_and(|(.., k)| k.leader == *proof);
                if answered && let Some((.., key)) = follows.answered.take() {
                    tracing::info!(peer = %from, generation = key.generation, "preshared key changed");
                    pair.current = Some(Key { since: now, ..key });
                    (pair.asked, pair.unsaved, pair.again) = (false, true, Again::now());
                    self.changes += 1;
                }
                self.out.push((from, pair.at(Some(*proof))));
            }
            // Not a leader's to say.
            Note::Answer { .. } | Note::At { .. } | Note::Want { .. } => {}
        }
    }

    fn answer(&mut self, from: Ipv4Addr, (generation, offer): (u64, PublicKey), now: u64) {
        let Some(pair) = self.pairs.get_mut(&from) else { return };
        let once = match PrivateKey::generate() {
            Ok(once) => once,
            Err(error) => {
                // The leader asks again.
                tracing::warn!(%error, peer = %from, "no new key");
                return;
            }
        };
        let leader = End { at: from, fixed: pair.peer, once: offer };
        let follower = End { at: self.own, fixed: self.public, once: once.public() };
        let own = Own { fixed: &self.fixed, once: &once };
        let made = pair_key::derive(&own, &leader, (&leader, &follower), generation, now);
        let Some(key) = made else {
            tracing::warn!(peer = %from, "what it offers is no key");
            return;
        };
        let answer = Note::Answer { offer, key: follower.once, proof: key.follower };
        let answered = Some((offer, answer.clone(), key));
        pair.role = Role::Follows(Follows { answered, heard: true });
        self.out.push((from, answer));
    }

    fn hear_follower(&mut self, from: Ipv4Addr, note: &Note, now: u64) {
        match note {
            Note::Answer { offer, key, proof } => self.take(from, (*offer, *key), *proof, now),
            Note::At { generation, proof, to } => {
                self.hear_at(from, *generation, (*proof, *to), now);
            }
            Note::Want { generation } => {
                let Some(pair) = self.pairs.get_mut(&from) else { return };
                if matches!(pair.role, Role::Leads(Step::Settled { .. }))
                    && *generation == pair.generation()
                {
                    self.offer(from, 0);
                    self.say_again(from, now);
                }
            }
            // Not a follower's to say.
            Note::Offer { .. } | Note::Commit { .. } => {}
        }
    }

    /// The follower has made the key that was offered.
    fn take(
        &mut self,
        from: Ipv4Addr,
        (offer, theirs): (PublicKey, PublicKey),
        proof: Proof,
        now: u64,
    ) {
        let Some(pair) = self.pairs.get_mut(&from) else { return };
        let Role::Leads(Step::Offering { generation, once }) = &pair.role else { return };
        if once.public() != offer {
            return;
        }
        let leader = End { at: self.own, fixed: self.public, once: offer };
        let follower = End { at: from, fixed: pair.peer, once: theirs };
        let own = Own { fixed: &self.fixed, once };
        let made = pair_key::derive(&own, &follower, (&leader, &follower), *generation, now);
        let Some(next) = made.filter(|key| key.follower == proof) else {
            tracing::warn!(peer = %from, "its answer does not fit the offer; somebody changed one of them");
            return;
        };
        pair.role = Role::Leads(Step::Committing { next, since: now });
        (pair.again, pair.unsaved) = (Again::now(), true);
        self.say_again(from, now);
    }

    /// The follower says which key it uses.
    fn hear_at(
        &mut self,
        from: Ipv4Addr,
        generation: u64,
        (proof, to): (Option<Proof>, Option<Proof>),
        now: u64,
    ) {
        let Some(pair) = self.pairs.get_mut(&from) else { return };
        let current = pair.current.as_ref();
        let has = |key: &Key| proof == Some(key.follower);
        // Said when it was asked for just this key: it does not know it, and never will.
        let lacks = |key: &Key| to == Some(key.leader);
        let Role::Leads(step) = &mut pair.role else { return };
        match step {
            Step::Committing { next, .. } if has(next) => {
                tracing::info!(peer = %from, generation = next.generation, "preshared key changed");
                pair.current = Some(Key { since: now, ..next.clone() });
                *step = Step::Settled { sure: true };
                (pair.asked, pair.unsaved) = (false, true);
                pair.again = Again::in_time(now, CHECK);
                self.changes += 1;
            }
            Step::Settled { sure } if to.is_some() && current.is_some_and(has) => {
                *sure = true;
                pair.again = Again::in_time(now, CHECK);
            }
            Step::Committing { next, .. } if lacks(next) => self.begin_anew(from, generation, now),
            Step::Settled { .. } if current.is_none_or(lacks) => {
                self.begin_anew(from, generation, now);
            }
            Step::Offering { generation: offered, .. } if generation >= *offered => {
                self.begin_anew(from, generation, now);
            }
            // It greets, and is asked.
            _ if to.is_none() => {
                pair.again = Again::now();
                self.say_again(from, now);
            }
            _ => {}
        }
    }

    fn begin_anew(&mut self, at: Ipv4Addr, theirs: u64, now: u64) {
        tracing::info!(peer = %at, "it has another preshared key, or none: a new one is offered");
        self.offer(at, theirs);
        self.say_again(at, now);
    }

    /// What is to be written down before anything else is done.
    pub(crate) fn files(&self) -> Vec<(Ipv4Addr, File)> {
        let removed = self.gone.iter().filter(|at| !self.pairs.contains_key(at));
        let removed = removed.map(|at| (*at, File::Remove));
        let changed = self.pairs.iter().filter(|(_, pair)| pair.unsaved).map(|(at, pair)| {
            let next = match &pair.role {
                Role::Leads(Step::Committing { next, .. }) => Some(next.clone()),
                _ => None,
            };
            let saved = Saved::new((self.public, pair.peer), pair.current.clone(), next);
            (*at, File::Write(Box::new(saved)))
        });
        removed.chain(changed).collect()
    }

    /// All of [`Self::files`] was done.
    pub(crate) fn saved(&mut self) {
        self.gone.clear();
        for pair in self.pairs.values_mut() {
            pair.unsaved = false;
        }
    }

    /// What is to be said when that was done, and the kernel was told.
    pub(crate) fn take_out(&mut self) -> Vec<(Ipv4Addr, Note)> {
        std::mem::take(&mut self.out)
    }
}

impl Pair {
    fn new(peer: PublicKey, lead: bool) -> Self {
        let role = if lead {
            Role::Leads(Step::Settled { sure: false })
        } else {
            Role::Follows(Follows::default())
        };
        let (asked, unsaved) = (false, false);
        Self { peer, current: None, role, again: Again::now(), asked, unsaved }
    }

    fn generation(&self) -> u64 {
        self.current.as_ref().map_or(0, |key| key.generation)
    }

    /// The key in use, by its follower.
    fn at(&self, to: Option<Proof>) -> Note {
        let proof = self.current.as_ref().map(|key| key.follower);
        Note::At { generation: self.generation(), proof, to }
    }
}

impl Key {
    /// Use it, by its leader.
    fn commit(&self) -> Note {
        Note::Commit { generation: self.generation, proof: self.leader }
    }
}

#[cfg(test)]
#[path = "pairs_tests.rs"]
mod tests;
