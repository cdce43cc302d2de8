use super::*;
use proptest::prelude::*;

const LEADER: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
const FOLLOWER: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
const START: u64 = 1_764_000_000_000;
/// Longest time from when notes come through again to one key at both: a leader that was sure asks again, and
/// both have waited for as long as they ever do.
const BOUND: u64 = CHECK + AGAIN.1 + 10_000;

/// What is decided at random, from a seed.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Two ends, what is written down at each, and what is on its way between them.
struct Two {
    now: u64,
    passed: u64,
    ends: [Pairs; 2],
    fixed: [PrivateKey; 2],
    disks: [Option<Saved>; 2],
    every: Option<Duration>,
    /// When it comes, to which end, what.
    under_way: Vec<(u64, usize, Note)>,
    dice: Dice,
    /// Of a hundred notes, as many are lost, and as many come twice.
    lost: u64,
    doubled: u64,
    /// Longest time on the way, in ms.
    slow: u64,
    /// Of everything that was said.
    said: Vec<String>,
}

const AT: [Ipv4Addr; 2] = [LEADER, FOLLOWER];

impl Two {
    fn new(every: Option<Duration>, seed: u64) -> Self {
        let fixed = [0; 2].map(|_| PrivateKey::generate().unwrap());
        let ends = [0, 1].map(|end| Pairs::new(AT[end], fixed[end].clone(), every));
        let mut two = Self {
            now: START,
            passed: 0,
            ends,
            fixed,
            disks: [None, None],
            every,
            under_way: Vec::new(),
            dice: Dice(seed | 1),
            lost: 0,
            doubled: 0,
            slow: 20,
            said: Vec::new(),
        };
        two.meet(0);
        two.meet(1);
        two
    }

    /// An end hears of the other one.
    fn meet(&mut self, end: usize) {
        let other = 1 - end;
        self.ends[end].set_ends([(AT[other], self.fixed[other].public())].into_iter());
        self.ends[end].greet(None);
    }

    fn restart(&mut self, end: usize) {
        self.ends[end] = Pairs::new(AT[end], self.fixed[end].clone(), self.every);
        if let Some(saved) = &self.disks[end] {
            // As it would come from the file.
            let text = serde_json::to_string(saved).unwrap();
            let saved = Saved::read(&text).unwrap();
            self.ends[end].restore(AT[1 - end], saved, self.now);
        }
        self.meet(end);
    }

    /// What [`super::Secure`] does with an end after each event.
    fn settle(&mut self, end: usize) {
        for (at, file) in self.ends[end].files() {
            assert_eq!(at, AT[1 - end]);
            self.disks[end] = match file {
                File::Write(saved) => Some(*saved),
                File::Remove => None,
            };
        }
        self.ends[end].saved();
        for (to, note) in self.ends[end].take_out() {
            assert_eq!(to, AT[1 - end]);
            self.said.push(serde_json::to_string(&note).unwrap());
            for _ in 0..1 + u64::from(self.dice.throw(100) < self.doubled) {
                if self.dice.throw(100) >= self.lost {
                    let at = self.now + 1 + self.dice.throw(self.slow);
                    self.under_way.push((at, 1 - end, note.clone()));
                }
            }
        }
    }

    /// Lets time pass; ends look at it once a second.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(100) {
            (self.now, self.passed) = (self.now + 100, self.passed + 100);
            let (arrived, rest) =
                std::mem::take(&mut self.under_way).into_iter().partition(|n| n.0 <= self.now);
            self.under_way = rest;
            let arrived: Vec<(u64, usize, Note)> = arrived;
            for (_, to, note) in arrived {
                self.ends[to].hear(AT[1 - to], &note, self.now);
                self.settle(to);
            }
            if self.passed.is_multiple_of(1000) {
                for end in 0..2 {
                    self.ends[end].tick(self.now);
                    self.settle(end);
                }
            }
        }
    }

    fn secrets(&self) -> [Option<pair_key::Secret>; 2] {
        [0, 1].map(|end| self.ends[end].secret(AT[1 - end], self.now))
    }

    fn states(&self) -> [PairState; 2] {
        [0, 1].map(|end| self.ends[end].states().next().unwrap().2)
    }

    fn agree(&self) -> bool {
        let [leader, follower] = self.states();
        let [one, other] = self.secrets();
        one.is_some()
            && one == other
            && leader.generation == follower.generation
            && !leader.changing
    }
}

#[test]
fn two_that_meet_agree_within_three_notes_and_change_in_time_without_being_told() {
    let mut two = Two::new(Some(Duration::from_secs(600)), 1);
    assert_eq!(two.secrets(), [None, None]);
    two.pass(2000);
    assert!(two.agree());
    assert_eq!(two.states().map(|s| s.generation), [1, 1]);
    let first = two.secrets();
    two.pass(590_000);
    assert_eq!(two.secrets(), first, "not before its time");
    two.pass(20_000);
    assert!(two.agree());
    assert_eq!(two.states().map(|s| s.generation), [2, 2]);
    assert_ne!(two.secrets(), first);
    assert_eq!(two.ends.each_ref().map(Pairs::changes), [2, 2]);
}

#[test]
fn either_end_changes_the_key_when_it_is_told_to() {
    for end in [0, 1] {
        let mut two = Two::new(None, 3);
        two.pass(2000);
        let before = two.secrets();
        two.ends[end].rotate();
        two.pass(3000);
        assert!(two.agree() && two.secrets() != before, "end {end}");
        let before = two.secrets();
        two.pass(600_000);
        assert_eq!(two.secrets(), before, "once");
    }
}

#[test]
fn a_lost_word_of_the_change_leaves_both_with_a_key_for_the_handshakes_in_between() {
    // The follower changes; that it has done so is not heard for minutes.
    let mut two = Two::new(None, 5);
    two.pass(2000);
    let [old, _] = two.secrets();
    two.ends[0].rotate();
    while two.secrets()[1] == old {
        two.pass(100);
    }
    two.lost = 100;
    two.under_way.clear();
    let [_, new] = two.secrets();
    // Each of 30 handshakes, at most 6 s after one that failed: at least one in each 20 s works.
    let mut fit = 0;
    for _ in 0..6 {
        let works = (0..4).filter(|_| {
            two.pass(5000);
            two.secrets()[0] == new
        });
        fit += u32::from(works.count() > 0);
        assert_eq!(two.secrets()[1], new, "the follower stays");
    }
    assert_eq!(fit, 6);
    two.lost = 0;
    two.pass(BOUND);
    assert!(two.agree() && two.secrets()[0] == new);
}

#[test]
fn who_is_killed_at_any_step_of_a_change_goes_on_with_it_or_begins_it_anew() {
    for end in [0, 1] {
        for step in 0..12 {
            let mut two = Two::new(None, 7);
            two.slow = 400;
            two.pass(4000);
            let before = two.secrets();
            two.ends[0].rotate();
            two.pass(step * 200);
            two.restart(end);
            two.pass(BOUND);
            assert!(two.agree(), "end {end}, step {step}");
            // A leader that was killed before both had made the key has forgotten that it was told to.
            assert!(end == 0 || two.secrets() != before, "end {end}, step {step}");
        }
    }
}

#[test]
fn an_end_with_an_older_folder_and_one_with_none_find_each_other_again() {
    for (end, forgets) in [(0, true), (0, false), (1, true), (1, false)] {
        let mut two = Two::new(None, 11);
        two.pass(2000);
        let old = two.disks[end].clone();
        for _ in 0..3 {
            two.ends[0].rotate();
            two.pass(3000);
        }
        assert_eq!(two.states().map(|s| s.generation), [4, 4]);
        two.disks[end] = if forgets { None } else { old };
        two.restart(end);
        two.pass(BOUND);
        assert!(two.agree(), "end {end}, forgets {forgets}");
        assert!(
            two.states()[0].generation > 4,
            "a key that one of them has lost is used by nobody"
        );
    }
}

#[test]
fn who_has_another_static_key_begins_anew_and_who_is_gone_leaves_no_file() {
    let mut two = Two::new(None, 13);
    two.pass(2000);
    let old = two.secrets();
    two.fixed[1] = PrivateKey::generate().unwrap();
    two.restart(1);
    assert_eq!(two.secrets()[1], None, "its folder's key was with another one");
    two.pass(5000);
    assert!(!two.agree(), "the leader has not heard of it");
    two.meet(0);
    two.pass(5000);
    assert!(two.agree() && two.secrets() != old);
    two.ends[0].set_ends(std::iter::empty());
    two.settle(0);
    assert!(two.disks[0].is_none());
    assert!(two.ends[0].states().next().is_none());
}

#[test]
fn whoever_passes_notes_on_learns_no_key_and_cannot_make_them_use_one() {
    // It answers the leader's offer itself, and offers something to the follower.
    let mut two = Two::new(None, 17);
    two.pass(2000);
    let before = two.secrets();
    let own = PrivateKey::generate().unwrap();
    two.ends[0].rotate();
    two.ends[0].tick(two.now);
    let offer = two.ends[0].take_out().into_iter().find_map(|(_, note)| match note {
        Note::Offer { key, .. } => Some(key),
        _ => None,
    });
    let forged = |proof| Note::Answer { offer: offer.unwrap(), key: own.public(), proof };
    let (_, _, key) = {
        let pair = &two.ends[1].pairs[&LEADER];
        (0, 0, pair.current.clone().unwrap())
    };
    for proof in [key.leader, key.follower] {
        two.ends[0].hear(FOLLOWER, &forged(proof), two.now);
    }
    let offered = Note::Offer { generation: 9, key: own.public() };
    two.ends[1].hear(LEADER, &offered, two.now);
    let answer = two.ends[1].take_out().pop().unwrap().1;
    let Note::Answer { proof, .. } = answer else { panic!("{answer:?}") };
    // What it was told itself, played back.
    two.ends[1].hear(LEADER, &Note::Commit { generation: 9, proof }, two.now);
    assert_eq!(two.secrets(), before);
    // And nothing that was ever said has the key.
    let texts = before.map(|secret| secret.unwrap().text());
    two.pass(5000);
    assert!(two.agree() && two.secrets() != before, "the change itself goes on");
    assert!(!two.said.is_empty() && two.said.iter().all(|said| !said.contains(&texts[0])));
}

#[test]
fn words_that_make_no_sense_change_nothing() {
    let mut two = Two::new(None, 19);
    two.pass(2000);
    let (before, states) = (two.secrets(), two.states());
    let key = PrivateKey::generate().unwrap().public();
    let current = two.ends[0].pairs[&FOLLOWER].current.clone().unwrap();
    let proof = current.leader;
    for generation in [0, 1, GENERATIONS, u64::MAX] {
        for note in [
            Note::Offer { generation, key },
            Note::Answer { offer: key, key, proof },
            Note::Commit { generation, proof: current.follower },
            Note::Want { generation: generation.max(2) },
        ] {
            for end in 0..2 {
                two.ends[end].hear(AT[1 - end], &note, two.now);
                two.ends[end].hear(Ipv4Addr::new(100, 64, 0, 9), &note, two.now);
            }
        }
    }
    let at = Note::At { generation: u64::MAX, proof: None, to: Some(current.leader) };
    two.ends[0].hear(FOLLOWER, &at, two.now);
    assert_eq!((two.secrets(), two.states()), (before, states));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Notes are lost, doubled and late by up to ten seconds, ends are killed, their folders are put back, keys
    /// are changed at both, clocks jump: once notes come through again, both have one key within the bound.
    #[test]
    fn both_end_at_one_key(
        seed in any::<u64>(),
        lost in 0_u64..80,
        doubled in 0_u64..50,
        slow in 1_u64..10_000,
        deeds in prop::collection::vec((0_u8..7, 0_usize..2, 0_u64..20_000), 1..40),
    ) {
        let mut two = Two::new(Some(Duration::from_secs(60)), seed);
        (two.lost, two.doubled, two.slow) = (lost, doubled, slow);
        let mut older = [None, None];
        for (deed, end, wait) in deeds {
            match deed {
                0 => two.restart(end),
                1 => two.ends[end].rotate(),
                2 => two.ends[end].greet(None),
                3 => older[end] = two.disks[end].clone(),
                4 => {
                    two.disks[end] = older[end].clone();
                    two.restart(end);
                }
                5 => two.now -= wait,
                _ => {}
            }
            two.pass(wait);
        }
        (two.lost, two.doubled, two.slow, two.every) = (0, 0, 20, None);
        // Nothing of before is left under way.
        two.under_way.clear();
        for end in &mut two.ends {
            end.every = None;
        }
        two.pass(BOUND);
        prop_assert!(two.agree(), "{:?}\n{:#?}", two.states(), two.said.iter().rev().take(12).collect::<Vec<_>>());
    }
}
