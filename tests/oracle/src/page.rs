//! Pages that describe themselves: any wrong bit, wrong place or wrong time shows.

use std::fmt;

/// Bytes of a page, in memory and in the file.
pub(crate) const PAGE: usize = 4096;

const WORDS: usize = PAGE / 8;

/// "oraclepg" in the bytes of a little-endian machine.
const MAGIC: u64 = u64::from_le_bytes(*b"oraclepg");

/// One page: magic, number, generation and run, then words that follow from the three.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Page([u64; WORDS]);

/// What a page must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Its place.
    pub(crate) number: u64,
    /// How often it was written.
    pub(crate) generation: u64,
    /// Which oracle wrote it.
    pub(crate) run: u64,
}

/// How a page differs from what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// Not one bit is set.
    Zero,
    /// A whole page of an older (or, strangely, newer) generation.
    Generation { has: u64 },
    /// A whole page of another place.
    Place { has: u64 },
    /// A whole page of another oracle.
    Run { has: u64 },
    /// Words that do not fit the page's own head, or no head at all.
    Torn { word: usize, has: u64, wants: u64, words: usize },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("is all zeros"),
            Self::Generation { has } => write!(f, "holds generation {has}"),
            Self::Place { has } => write!(f, "holds page {has}"),
            Self::Run { has } => write!(f, "holds a page of run {has:#x}"),
            Self::Torn { word, has, wants, words } => {
                write!(f, "has {words} wrong words, the first is {word}: {has:#x}, not {wants:#x}")
            }
        }
    }
}

impl Identity {
    /// Where the page's sequence of words begins.
    fn seed(self) -> u64 {
        mix(self.number ^ mix(self.generation ^ mix(self.run)))
    }

    fn head(self) -> [u64; 4] {
        [MAGIC, self.number, self.generation, self.run]
    }
}

/// SplitMix64's finisher: every input bit changes about half of the output.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The next word of a page's sequence: Knuth's linear congruence, one multiplication a word.
const fn step(x: u64) -> u64 {
    x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}

impl Page {
    pub(crate) const ZERO: Self = Self([0; WORDS]);

    /// Makes the whole page what `identity` says.
    pub(crate) fn write(&mut self, identity: Identity) {
        let (head, body) = self.0.split_at_mut(4);
        head.copy_from_slice(&identity.head());
        let mut value = identity.seed();
        for word in body {
            value = step(value);
            *word = value;
        }
    }

    /// Reads the whole page.
    pub(crate) fn check(&self, wants: Identity) -> Result<(), Mismatch> {
        if self.is(wants) { Ok(()) } else { Err(self.diagnose(wants)) }
    }

    fn is(&self, wants: Identity) -> bool {
        self.differences(wants).next().is_none()
    }

    /// The words that differ: place, has, wants.
    fn differences(&self, wants: Identity) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        let head = wants.head();
        let mut value = wants.seed();
        self.0.iter().enumerate().filter_map(move |(at, has)| {
            let want = head.get(at).copied().unwrap_or_else(|| {
                value = step(value);
                value
            });
            (*has != want).then_some((at, *has, want))
        })
    }

    /// Gives a difference its name: a page that is whole by its own head is a page that somebody
    /// mislaid; everything else is torn.
    fn diagnose(&self, wants: Identity) -> Mismatch {
        if self.0.iter().all(|word| *word == 0) {
            return Mismatch::Zero;
        }
        let [_, number, generation, run, ..] = self.0;
        if self.is(Identity { number, generation, run }) {
            return if run != wants.run {
                Mismatch::Run { has: run }
            } else if number != wants.number {
                Mismatch::Place { has: number }
            } else {
                Mismatch::Generation { has: generation }
            };
        }
        let mut differences = self.differences(wants);
        // There is one, or nobody would have asked.
        let (word, has, wants) = differences.next().unwrap_or_default();
        Mismatch::Torn { word, has, wants, words: 1 + differences.count() }
    }

    /// The page for a file.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// A page from a file; what is missing at its end is zero.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let mut page = Self::ZERO;
        for (word, bytes) in page.0.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            *word = u64::from_le_bytes(eight);
        }
        page
    }

    #[cfg(test)]
    pub(crate) fn flip(&mut self, bit: usize) {
        self.0[bit / 64] ^= 1 << (bit % 64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Identity = Identity { number: 17, generation: 5, run: 99 };

    fn page(identity: Identity) -> Page {
        let mut page = Page::ZERO;
        page.write(identity);
        page
    }

    #[test]
    fn a_page_is_one_page_of_the_machine() {
        assert_eq!((size_of::<Page>(), align_of::<Page>()), (PAGE, PAGE));
    }

    #[test]
    fn every_single_flipped_bit_is_caught() {
        let mut page = page(HERE);
        assert_eq!(page.check(HERE), Ok(()));
        for bit in 0..PAGE * 8 {
            page.flip(bit);
            match page.check(HERE) {
                Err(Mismatch::Torn { word, words, .. }) => {
                    assert_eq!((word, words), (bit / 64, 1));
                }
                other => panic!("bit {bit}: {other:?}"),
            }
            page.flip(bit);
        }
        assert_eq!(page.check(HERE), Ok(()));
    }

    #[test]
    fn a_stale_page_is_called_by_its_generation() {
        let old = Identity { generation: 4, ..HERE };
        assert_eq!(page(old).check(HERE), Err(Mismatch::Generation { has: 4 }));
    }

    #[test]
    fn a_page_from_another_place_or_another_run_is_called_so() {
        let other = Identity { number: 18, ..HERE };
        assert_eq!(page(other).check(HERE), Err(Mismatch::Place { has: 18 }));
        let older = Identity { number: 18, generation: 1, ..HERE };
        assert_eq!(page(older).check(HERE), Err(Mismatch::Place { has: 18 }));
        let foreign = Identity { run: 1, ..HERE };
        assert_eq!(page(foreign).check(HERE), Err(Mismatch::Run { has: 1 }));
    }

    #[test]
    fn a_page_that_is_half_old_is_torn_and_an_empty_one_is_zero() {
        let mut torn = page(HERE);
        let old = page(Identity { generation: 4, ..HERE });
        torn.0[WORDS / 2..].copy_from_slice(&old.0[WORDS / 2..]);
        match torn.check(HERE) {
            Err(Mismatch::Torn { word, words, .. }) => {
                assert_eq!((word, words), (WORDS / 2, WORDS / 2));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(Page::ZERO.check(HERE), Err(Mismatch::Zero));
    }

    #[test]
    fn a_page_comes_back_from_its_bytes_and_a_short_read_is_caught() {
        let bytes = page(HERE).to_bytes();
        assert_eq!(Page::from_bytes(&bytes).check(HERE), Ok(()));
        assert!(Page::from_bytes(&bytes[..PAGE - 8]).check(HERE).is_err());
        assert_eq!(Page::from_bytes(&[]).check(HERE), Err(Mismatch::Zero));
    }

    #[test]
    fn no_two_neighbours_share_a_pattern() {
        let seeds: std::collections::BTreeSet<u64> = (0..100)
            .flat_map(|number| (0..100).map(move |generation| (number, generation)))
            .map(|(number, generation)| Identity { number, generation, run: 1 }.seed())
            .collect();
        assert_eq!(seeds.len(), 10_000);
    }
}
