//! Where blocks wait that were copied before a write: in memory, then in a file that has no name.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// Room for copies.
#[derive(Clone, Debug)]
pub struct ScratchOptions {
    /// In memory, in bytes.
    pub memory: u64,
    /// In a file, in bytes. When that is full too, the round is given up rather than a writer held.
    pub file: u64,
    /// The folder of the file.
    pub folder: PathBuf,
}

impl ScratchOptions {
    /// 64 MiB in memory, then up to 4 GiB in `folder`.
    #[must_use]
    pub fn in_folder(folder: &Path) -> Self {
        Self { memory: 64 << 20, file: 4 << 30, folder: folder.to_owned() }
    }
}

enum Place {
    Memory(Box<[u8]>),
    File { slot: u64 },
}

#[derive(Default)]
struct Inside {
    places: HashMap<(usize, u64), Place>,
    memory: u64,
    file: Option<File>,
    /// Slots of one block size each, in bytes.
    end: u64,
    free: Vec<(u64, u64)>,
}

pub(super) struct Scratch {
    inside: Mutex<Inside>,
    options: ScratchOptions,
}

impl Scratch {
    pub(super) fn new(options: ScratchOptions) -> Self {
        Self { inside: Mutex::default(), options }
    }

    /// Keeps a block.
    pub(super) fn put(&self, device: usize, block: u64, content: &[u8]) -> io::Result<()> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let length = content.len() as u64;
        if inside.memory + length <= self.options.memory {
            inside.memory += length;
            inside.places.insert((device, block), Place::Memory(content.into()));
            return Ok(());
        }
        let free = inside.free.iter().position(|(_, size)| *size >= length);
        let slot = match free {
            Some(at) => inside.free.swap_remove(at).0,
            None if inside.end + length > self.options.file => {
                return Err(io::Error::new(
                    io::ErrorKind::StorageFull,
                    format!(
                        "writing is so much faster than the upload that {} bytes of memory and {} bytes of file for old content are full; give the backup more room or bandwidth",
                        self.options.memory, self.options.file
                    ),
                ));
            }
            None => {
                inside.end += length;
                inside.end - length
            }
        };
        if inside.file.is_none() {
            inside.file = Some(tempfile::tempfile_in(&self.options.folder)?);
        }
        if let Some(file) = &inside.file {
            file.write_all_at(content, slot)?;
        }
        inside.places.insert((device, block), Place::File { slot });
        Ok(())
    }

    /// Takes a block out.
    pub(super) fn take(&self, device: usize, block: u64, out: &mut [u8]) -> io::Result<()> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        match inside.places.remove(&(device, block)) {
            Some(Place::Memory(content)) => {
                inside.memory -= content.len() as u64;
                out.copy_from_slice(&content[..out.len()]);
                Ok(())
            }
            Some(Place::File { slot }) => {
                inside.free.push((slot, out.len() as u64));
                match &inside.file {
                    Some(file) => file.read_exact_at(out, slot),
                    None => Err(io::Error::other("the scratch file is not there")),
                }
            }
            None => Err(io::Error::other(format!("block {block} was read before, or never saved"))),
        }
    }

    /// Bytes in memory and in the file.
    pub(super) fn used(&self) -> (u64, u64) {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        (inside.memory, inside.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_back_from_memory_and_file_and_room_is_used_again_until_it_is_full() {
        let folder = tempfile::tempdir().unwrap();
        let options =
            ScratchOptions { memory: 4096 * 2, file: 4096 * 3, folder: folder.path().into() };
        let scratch = Scratch::new(options);
        for round in 0..3u8 {
            for block in 0..5 {
                scratch.put(0, block, &[round * 10 + block as u8; 4096]).unwrap();
            }
            let full = scratch.put(0, 5, &[0; 4096]).unwrap_err();
            assert_eq!(full.kind(), io::ErrorKind::StorageFull);
            for block in 0..5 {
                let mut out = [0; 4096];
                scratch.take(0, block, &mut out).unwrap();
                assert_eq!(out, [round * 10 + block as u8; 4096]);
            }
        }
        assert_eq!(scratch.used(), (0, 4096 * 3));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
    }
}
