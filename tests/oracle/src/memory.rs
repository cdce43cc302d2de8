//! The part of memory that is written and checked. One thread owns it.

use crate::{
    page::{Identity, Mismatch, PAGE, Page},
    report::Finding,
    sys,
};

/// Pages, and what each must hold. The table lies elsewhere in memory, so that a page that comes
/// back old does not bring its own excuse.
pub(crate) struct Memory {
    pages: Vec<Page>,
    generations: Vec<u64>,
    /// Pages found wrong since they were last written: each counts once.
    wrong: Vec<bool>,
    run: u64,
    /// Pages below this number are rewritten, the others stay.
    hot: usize,
    random: u64,
    next_check: usize,
}

impl Memory {
    /// Writes all pages once. `hot` is cut to `pages`.
    pub(crate) fn new(pages: usize, hot: usize, run: u64) -> Self {
        let mut memory = Self {
            pages: vec![Page::ZERO; pages],
            generations: vec![0; pages],
            wrong: vec![false; pages],
            run,
            hot: hot.min(pages),
            random: run | 1,
            next_check: 0,
        };
        for at in 0..pages {
            memory.rewrite(at);
        }
        memory
    }

    pub(crate) fn len(&self) -> usize {
        self.pages.len()
    }

    /// Pins the pages; an error if the system does not allow it.
    pub(crate) fn lock(&self) -> std::io::Result<()> {
        sys::lock(&self.pages)
    }

    fn identity(&self, at: usize) -> Identity {
        Identity { number: at as u64, generation: self.generations[at], run: self.run }
    }

    fn rewrite(&mut self, at: usize) {
        self.generations[at] += 1;
        self.wrong[at] = false;
        let identity = self.identity(at);
        self.pages[at].write(identity);
    }

    /// Rewrites `count` hot pages, picked at random; returns the bytes written.
    pub(crate) fn dirty(&mut self, count: u64) -> u64 {
        if self.hot == 0 {
            return 0;
        }
        for _ in 0..count {
            // xorshift64: never 0, because it began odd.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.rewrite((self.random % self.hot as u64) as usize);
        }
        count * PAGE as u64
    }

    /// Checks the next `count` pages in turn; returns what was found and how often the end was
    /// reached.
    pub(crate) fn check(&mut self, count: u64) -> (Vec<Finding>, u64) {
        let (mut findings, mut passes) = (Vec::new(), 0);
        if self.pages.is_empty() {
            return (findings, 0);
        }
        for _ in 0..count {
            let at = self.next_check;
            findings.extend(self.check_one(at));
            self.next_check += 1;
            if self.next_check == self.pages.len() {
                self.next_check = 0;
                passes += 1;
            }
        }
        (findings, passes)
    }

    fn check_one(&mut self, at: usize) -> Option<Finding> {
        let wants = self.identity(at);
        let mismatch: Mismatch = self.pages[at].check(wants).err()?;
        let known = std::mem::replace(&mut self.wrong[at], true);
        (!known).then(|| Finding::new("page", wants, &mismatch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Memory {
        fn check_all(&mut self) -> Vec<Finding> {
            self.check(self.pages.len() as u64).0
        }
    }

    #[test]
    fn what_is_written_is_found_right_over_many_rounds() {
        let mut memory = Memory::new(64, 16, 7);
        for _ in 0..200 {
            assert_eq!(memory.dirty(10), 10 * PAGE as u64);
            let (findings, _) = memory.check(7);
            assert!(findings.is_empty(), "{findings:?}");
        }
        assert!(memory.check_all().is_empty());
        assert!(memory.generations[..16].iter().all(|generation| *generation > 1));
        assert!(memory.generations[16..].iter().all(|generation| *generation == 1));
    }

    #[test]
    fn passes_are_counted_at_the_end_of_memory() {
        let mut memory = Memory::new(10, 0, 7);
        let passes: Vec<u64> = (0..4).map(|_| memory.check(5).1).collect();
        assert_eq!(passes, [0, 1, 0, 1]);
        assert_eq!(memory.dirty(100), 0);
    }

    #[test]
    fn a_flipped_bit_counts_once_until_the_page_is_written_again() {
        let mut memory = Memory::new(8, 8, 7);
        memory.pages[3].flip(12_345);
        let findings = memory.check_all();
        assert_eq!(findings.len(), 1);
        assert!(findings[0].to_string().contains("page 3"), "{}", findings[0]);
        assert!(memory.check_all().is_empty(), "the same wrong page is not counted again");
        memory.rewrite(3);
        memory.pages[3].flip(0);
        assert_eq!(memory.check_all().len(), 1, "a page that goes wrong again is");
    }

    #[test]
    fn a_page_that_lost_a_write_is_found_stale() {
        let mut memory = Memory::new(8, 8, 7);
        let before = memory.pages[5].clone();
        memory.rewrite(5);
        memory.pages[5] = before;
        let text = memory.check_all()[0].to_string();
        assert!(text.contains("holds generation 1") && text.contains("wants 2"), "{text}");
    }

    #[test]
    fn two_swapped_pages_are_both_found() {
        let mut memory = Memory::new(8, 8, 7);
        memory.pages.swap(1, 6);
        let texts: Vec<String> = memory.check_all().iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), 2);
        assert!(texts[0].contains("page 1") && texts[0].contains("holds page 6"), "{texts:?}");
    }
}
