//! `/proc/<pid>/maps`: what a process has mapped where.

use std::fmt;

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// The address behind it.
    pub end: u64,
    /// Whether the process may read it.
    pub readable: bool,
    /// Whether the process may write to it.
    pub writable: bool,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The file, or a name in brackets, or nothing.
    pub name: String,
}

impl Mapping {
    /// In bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.end - self.start
    }

    fn is_of(&self, file: &str) -> bool {
        let name = self.name.strip_suffix(" (deleted)").unwrap_or(&self.name);
        let last = name.rsplit('/').next().unwrap_or(name);
        !name.is_empty()
            && (name == file || last == file || last.strip_prefix("memfd:") == Some(file))
    }
}

/// Which mapping is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapChoice {
    /// All parts of a file that are mapped: by its path, its name, or the name of a memfd.
    File(String),
    /// The one mapping that holds an address.
    Address(u64),
    /// All parts of a file that are mapped without a gap around an address: where the same file is
    /// mapped more than once.
    FileAt(String, u64),
}

impl fmt::Display for MapChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => write!(f, "file \"{file}\""),
            Self::Address(address) => write!(f, "address {address:#x}"),
            Self::FileAt(file, address) => write!(f, "file \"{file}\" at {address:#x}"),
        }
    }
}

/// All mappings; lines that make no sense are left out.
pub(super) fn parse(text: &[u8]) -> Vec<Mapping> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    let line = String::from_utf8_lossy(line);
    // address perms offset dev inode, then spaces, then a name that may have spaces in it.
    let mut rest = line.as_ref();
    let mut word = || {
        rest = rest.trim_start_matches(' ');
        let (word, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = tail;
        word
    };
    let (range, access, offset) = (word(), word(), word());
    let (_device, _inode) = (word(), word());
    let (start, end) = range.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
    let length = end.checked_sub(start).filter(|length| *length > 0)?;
    offset.checked_add(length)?;
    let access = access.as_bytes();
    Some(Mapping {
        start,
        end,
        readable: access.first() == Some(&b'r'),
        writable: access.get(1) == Some(&b'w'),
        offset,
        name: rest.trim_start_matches(' ').to_owned(),
    })
}

/// The mappings that are meant, by their place in the file.
pub(super) fn choose<'a>(maps: &'a [Mapping], choice: &MapChoice) -> Vec<&'a Mapping> {
    let readable = maps.iter().filter(|map| map.readable);
    let mut chosen: Vec<&Mapping> = match choice {
        MapChoice::File(file) => readable.filter(|map| map.is_of(file)).collect(),
        MapChoice::Address(address) => {
            readable.filter(|map| (map.start..map.end).contains(address)).collect()
        }
        MapChoice::FileAt(file, address) => {
            let all: Vec<_> = readable.filter(|map| map.is_of(file)).collect();
            all.chunk_by(|a, b| a.end == b.start && a.offset + a.length() == b.offset)
                .find(|run| run.iter().any(|map| (map.start..map.end).contains(address)))
                .map(<[_]>::to_vec)
                .unwrap_or_default()
        }
    };
    chosen.sort_by_key(|map| map.offset);
    chosen
}

/// Reads any bytes as a list of mappings, and chooses; for a fuzzer.
pub(crate) fn fuzz_maps(bytes: &[u8]) {
    let maps = parse(bytes);
    for choice in [
        MapChoice::File("memory".to_owned()),
        MapChoice::Address(0x1000),
        MapChoice::FileAt("memory".to_owned(), 0x1000),
    ] {
        let _ = choose(&maps, &choice);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"\
1000-3000 rw-s 00000000 00:01 77                         /memfd:ram one (deleted)
3000-4000 r--s 00002000 00:01 77                         /memfd:ram one (deleted)
8000-9000 rw-s 00000000 00:01 77                         /memfd:ram one (deleted)
a000-b000 rw-p 00000000 00:00 0
b000-c000 ---p 00000000 00:00 0
c000-d000 r-xp 00001000 fe:00 5                          /usr/lib/libc.so.6
nonsense
ffff-1000 rw-p 00000000 00:00 0
0-ffffffffffffffff rw-p ffffffffffffffff 00:00 0
";

    #[test]
    fn mappings_are_found_by_file_and_by_address_and_nonsense_is_left_out() {
        let maps = parse(TEXT);
        assert_eq!(maps.len(), 6);
        assert!(maps[0].writable && !maps[1].writable && !maps[4].readable);
        let starts = |choice: MapChoice| -> Vec<u64> {
            choose(&maps, &choice).iter().map(|map| map.start).collect()
        };
        let file = "ram one".to_owned();
        assert_eq!(starts(MapChoice::File(file.clone())), [0x1000, 0x8000, 0x3000]);
        assert_eq!(starts(MapChoice::FileAt(file.clone(), 0x3100)), [0x1000, 0x3000]);
        assert_eq!(starts(MapChoice::FileAt(file, 0x8100)), [0x8000]);
        assert_eq!(starts(MapChoice::File("libc.so.6".into())), [0xc000]);
        assert_eq!(starts(MapChoice::File("/usr/lib/libc.so.6".into())), [0xc000]);
        assert_eq!(starts(MapChoice::Address(0xa800)), [0xa000]);
        assert!(starts(MapChoice::Address(0xb800)).is_empty(), "it may not be read");
        assert!(starts(MapChoice::File(String::new())).is_empty());
    }
}
