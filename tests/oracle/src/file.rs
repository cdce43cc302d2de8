//! The file that is written, synced, dropped from the cache, and read back from the disk.

use crate::{
    page::{Identity, PAGE, Page},
    report::Finding,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

/// A file of self-describing blocks, and what each must hold.
pub(crate) struct Blocks {
    file: File,
    generations: Vec<u64>,
    wrong: Vec<bool>,
    run: u64,
    random: u64,
    next_check: usize,
}

impl Blocks {
    /// Makes the file anew and writes every block once.
    pub(crate) fn create(path: &Path, blocks: usize, run: u64) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        let mut this = Self {
            file,
            generations: vec![0; blocks],
            wrong: vec![false; blocks],
            run,
            random: run.rotate_left(32) | 1,
            next_check: 0,
        };
        for at in 0..blocks {
            this.write(at)?;
        }
        this.settle()?;
        Ok(this)
    }

    pub(crate) fn len(&self) -> usize {
        self.generations.len()
    }

    fn identity(&self, at: usize) -> Identity {
        Identity { number: at as u64, generation: self.generations[at], run: self.run }
    }

    fn write(&mut self, at: usize) -> io::Result<()> {
        let next = Identity { generation: self.generations[at] + 1, ..self.identity(at) };
        let mut page = Page::ZERO;
        page.write(next);
        self.file.write_all_at(&page.to_bytes(), (at * PAGE) as u64)?;
        self.generations[at] = next.generation;
        self.wrong[at] = false;
        Ok(())
    }

    /// Makes all writes durable, then forgets what the cache holds: the next read asks the disk.
    fn settle(&self) -> io::Result<()> {
        self.file.sync_data()?;
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    }

    /// Rewrites `count` blocks picked at random, syncs, and reads them back from the disk.
    pub(crate) fn rewrite(&mut self, count: u64) -> io::Result<Vec<Finding>> {
        let mut written = Vec::new();
        for _ in 0..count {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let at = (self.random % self.generations.len() as u64) as usize;
            self.write(at)?;
            written.push(at);
        }
        self.settle()?;
        self.check_these(written.into_iter())
    }

    /// Checks the next `count` blocks in turn, from the disk.
    pub(crate) fn check(&mut self, count: usize) -> io::Result<Vec<Finding>> {
        let (start, length) = (self.next_check, self.len());
        self.next_check = (start + count) % length;
        self.check_these((start..start + count).map(|at| at % length))
    }

    /// Checks every block once, from the disk.
    pub(crate) fn check_all(&mut self) -> io::Result<Vec<Finding>> {
        self.settle()?;
        self.check_these(0..self.len())
    }

    fn check_these(&mut self, which: impl Iterator<Item = usize>) -> io::Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let mut buffer = vec![0; PAGE];
        for at in which {
            buffer.fill(0);
            self.file.read_exact_at(&mut buffer, (at * PAGE) as u64)?;
            let wants = self.identity(at);
            if let Err(mismatch) = Page::from_bytes(&buffer).check(wants)
                && !std::mem::replace(&mut self.wrong[at], true)
            {
                findings.push(Finding::new("block", wants, &mismatch));
            }
        }
        // What was read is in the cache now; the next check must not be answered from there.
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(findings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_blocks(name: &str, test: impl FnOnce(&mut Blocks, &Path)) {
        let path = std::env::temp_dir().join(format!("oracle-{name}-{}", std::process::id()));
        test(&mut Blocks::create(&path, 16, 7).unwrap(), &path);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_file_that_nobody_touches_is_right() {
        with_blocks("right", |blocks, _| {
            for _ in 0..10 {
                assert!(blocks.rewrite(4).unwrap().is_empty());
                assert!(blocks.check(5).unwrap().is_empty());
            }
            assert!(blocks.check_all().unwrap().is_empty());
        });
    }

    #[test]
    fn a_changed_byte_a_lost_write_and_a_swap_are_found_by_block() {
        with_blocks("wrong", |blocks, path| {
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let read = |at: usize| {
                let mut bytes = vec![0; PAGE];
                file.read_exact_at(&mut bytes, (at * PAGE) as u64).unwrap();
                bytes
            };
            let put = |at: usize, bytes: &[u8]| {
                file.write_all_at(bytes, (at * PAGE) as u64).unwrap();
            };
            let (old, one, two) = (read(9), read(1), read(2));
            blocks.write(9).unwrap();
            blocks.settle().unwrap();
            put(9, &old);
            put(1, &two);
            put(2, &one);
            put(12, &[0xff]);
            let texts: Vec<String> =
                blocks.check_all().unwrap().iter().map(ToString::to_string).collect();
            assert_eq!(texts.len(), 4, "{texts:?}");
            assert!(texts[0].contains("block 1 holds page 2"), "{texts:?}");
            assert!(texts[2].contains("block 9 holds generation 1; wants 2"), "{texts:?}");
            assert!(texts[3].contains("block 12 has 1 wrong words"), "{texts:?}");
            assert!(blocks.check_all().unwrap().is_empty(), "each counts once");
        });
    }

    #[test]
    fn a_shorter_file_is_an_error_and_not_a_finding() {
        with_blocks("short", |blocks, path| {
            OpenOptions::new().write(true).open(path).unwrap().set_len(PAGE as u64).unwrap();
            assert!(blocks.check_all().is_err());
        });
    }
}
