//! Frames that came to an edge before it had heard that their host has the machine: a control connection
//! that is slower than the way of frames. They wait, in order, until the map says that their sender is believed,
//! and are thrown away if it says that another host has the machine, or nothing in time. No I/O; time comes in.
//!
//! Any host of the fleet can send such frames, so their bounds are small and their own.

use super::{
    Bound,
    queue::{Load, cost},
};
use conduit_bpf::{Belief, Key};
use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

/// For one machine, and for all.
const MACHINE: Bound = Bound { frames: 2048, bytes: 4 << 20 };
const TOTAL: Bound = Bound { frames: 16_384, bytes: 32 << 20 };
/// An agent whose connection broke dials anew within that, and says everything again.
const AGE: Duration = Duration::from_secs(3);

/// What the outer header of a frame said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sender {
    /// The host that sent it.
    pub(super) outer: Ipv4Addr,
    /// Sixteen bits of the machine's epoch there.
    pub(super) wire: u16,
}

struct Frame {
    bytes: Box<[u8]>,
    sender: Sender,
    at: Instant,
}

#[derive(Default)]
struct Machine {
    frames: VecDeque<Frame>,
    load: Load,
}

/// See the module.
#[derive(Default)]
pub(super) struct Early {
    machines: BTreeMap<Key, Machine>,
    total: Load,
}

impl Early {
    pub(super) fn is_empty(&self) -> bool {
        self.machines.is_empty()
    }

    /// Takes a frame that a machine sent; false if there is no room.
    pub(super) fn push(&mut self, key: Key, sender: Sender, bytes: Box<[u8]>, at: Instant) -> bool {
        let cost = cost(&bytes);
        let load = self.machines.get(&key).map(|m| m.load).unwrap_or_default();
        if !load.fits(cost, MACHINE) || !self.total.fits(cost, TOTAL) {
            return false;
        }
        let machine = self.machines.entry(key).or_default();
        machine.frames.push_back(Frame { bytes, sender, at });
        machine.load.add(cost);
        self.total.add(cost);
        true
    }

    /// Gives back what is believed by now; returns how many frames were thrown away.
    pub(super) fn round(
        &mut self,
        now: Instant,
        believes: impl Fn(Key, Sender) -> Belief,
        mut give: impl FnMut(&[u8]),
    ) -> u64 {
        let mut lost = 0;
        for (key, machine) in &mut self.machines {
            while let Some(frame) = machine.frames.front() {
                match believes(*key, frame.sender) {
                    Belief::Yes => give(&frame.bytes),
                    Belief::NotYet if now.saturating_duration_since(frame.at) <= AGE => break,
                    Belief::NotYet | Belief::No => lost += 1,
                }
                let cost = cost(&frame.bytes);
                machine.frames.pop_front();
                machine.load.sub(cost);
                self.total.sub(cost);
            }
        }
        self.machines.retain(|_, machine| !machine.frames.is_empty());
        lost
    }

    /// Every frame with the time since it came; none is left.
    pub(super) fn drain(&mut self, now: Instant) -> Vec<(Duration, Box<[u8]>)> {
        let all = std::mem::take(self).machines.into_values().flat_map(|machine| machine.frames);
        all.map(|f| (now.saturating_duration_since(f.at), f.bytes)).collect()
    }

    pub(super) fn load(&self) -> Load {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENDER: Sender = Sender { outer: Ipv4Addr::new(10, 88, 0, 3), wire: 64 };

    fn key(last: u8) -> Key {
        Key { net: 7, address: [10, 77, 0, last].into() }
    }

    fn frame(number: u8) -> Box<[u8]> {
        vec![number; 100].into()
    }

    #[test]
    fn frames_are_given_back_in_order_when_their_sender_is_believed_and_the_others_wait() {
        let (mut early, now) = (Early::default(), Instant::now());
        for number in 0..4 {
            assert!(early.push(key(number % 2), SENDER, frame(number), now));
        }
        let mut given = Vec::new();
        let nobody = early.round(now, |_, _| Belief::NotYet, |_| panic!("given"));
        let one = |k, _| if k == key(1) { Belief::Yes } else { Belief::NotYet };
        let lost = early.round(now, one, |bytes| given.push(bytes[0]));
        assert_eq!((nobody, lost, given), (0, 0, vec![1, 3]));
        assert_eq!(early.load().frames, 2);
        assert_eq!(early.round(now, |_, _| Belief::No, |_| panic!("given")), 2);
        assert!(early.is_empty() && early.load() == Load::default());
    }

    #[test]
    fn what_is_too_much_is_refused_and_what_is_too_old_goes() {
        let (mut early, now) = (Early::default(), Instant::now());
        let taken = (0..5000).filter(|_| early.push(key(1), SENDER, frame(1), now)).count();
        assert_eq!(taken, 2048);
        assert!(early.push(key(2), SENDER, frame(2), now + AGE));
        let many = (3..=60)
            .map(|k| (0..2048).filter(|_| early.push(key(k), SENDER, frame(3), now)).count());
        assert_eq!(many.sum::<usize>() + 2048 + 1, 16_384);
        let lost = early.round(now + AGE + AGE / 2, |_, _| Belief::NotYet, |_| panic!("given"));
        assert_eq!(lost, 16_383);
        assert_eq!(early.drain(now + AGE).len(), 1);
        assert!(early.is_empty());
    }
}
