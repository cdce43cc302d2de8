//! `silo check`: the hash map of an image, and in what two images differ.
//!
//! A map is a text file: a line that says what it is of, then one line for each block with its
//! BLAKE3 hash, `-` for a block of zeros, and a last line with the hash of the whole.

use super::{human, print, progress::Progress};
use crate::config::ByteSize;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use silo::hash::RootHash;
use std::{
    fmt::Write as _,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Blocks are read in portions of about this many bytes.
const PORTION: usize = 4 << 20;
/// A line of a map is shorter than this.
const LONGEST_LINE: u64 = 200;
/// Differences are counted to the end, and listed up to this many ranges.
const LISTED: usize = 1000;

#[derive(Args)]
pub(super) struct CheckArgs {
    /// The image: a file or a block device
    image: PathBuf,
    /// Bytes of a block
    #[arg(long, default_value = "64K")]
    block_size: ByteSize,
    /// Write the map to this file (`-` for stdout)
    #[arg(long, value_name = "FILE")]
    map: Option<PathBuf>,
    /// Tell in which blocks this image, or a map that was written earlier, differs
    #[arg(long, value_name = "IMAGE or MAP")]
    compare: Option<PathBuf>,
}

/// What a block is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Zero,
    Hash(blake3::Hash),
}

/// Blocks in order, from an image or a map.
trait Blocks {
    /// The next ones, at least one; none at the end.
    fn portion(&mut self) -> Result<Vec<Block>>;
}

/// An image that is read from its beginning to its end.
struct Image {
    file: File,
    path: PathBuf,
    bytes: u64,
    block: usize,
    left: u64,
    buffer: Vec<u8>,
    whole: blake3::Hasher,
}

impl Image {
    fn open(path: &Path, block: usize) -> Result<Self> {
        let mut file =
            File::open(path).with_context(|| format!("could not open {}", path.display()))?;
        // Works for block devices too, whose metadata says 0.
        let bytes = file
            .seek(SeekFrom::End(0))
            .and_then(|bytes| file.rewind().map(|()| bytes))
            .with_context(|| format!("{} is not a file that can be read twice", path.display()))?;
        let buffer = vec![0; PORTION.next_multiple_of(block)];
        let (path, whole) = (path.to_owned(), blake3::Hasher::new());
        Ok(Self { file, path, bytes, block, left: bytes, buffer, whole })
    }
}

impl Blocks for Image {
    fn portion(&mut self) -> Result<Vec<Block>> {
        let length = usize::try_from(self.left).unwrap_or(usize::MAX).min(self.buffer.len());
        let buffer = &mut self.buffer[..length];
        self.file.read_exact(buffer).with_context(|| {
            format!("could not read {} at {}", self.path.display(), self.bytes - self.left)
        })?;
        self.left -= length as u64;
        self.whole.update_rayon(buffer);
        Ok(buffer.chunks(self.block).map(block_of).collect())
    }
}

fn block_of(content: &[u8]) -> Block {
    if content.iter().fold(0, |all, byte| all | byte) == 0 {
        Block::Zero
    } else {
        Block::Hash(blake3::hash(content))
    }
}

/// The first line of a map.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Head {
    bytes: u64,
    block: u64,
}

impl Head {
    const BEGIN: &str = "silo-map 1";

    fn line(self) -> String {
        format!("{} {} {}", Self::BEGIN, self.bytes, self.block)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix(Self::BEGIN)?.split_ascii_whitespace();
        let head = Self { bytes: words.next()?.parse().ok()?, block: words.next()?.parse().ok()? };
        (words.next().is_none() && head.block > 0).then_some(head)
    }

    fn blocks(self) -> u64 {
        self.bytes.div_ceil(self.block)
    }
}

/// A map that was written earlier.
struct Map {
    lines: BufReader<File>,
    path: PathBuf,
    head: Head,
    at: u64,
}

impl Map {
    /// `None` if the file is not a map.
    fn open(path: &Path) -> Result<Option<Self>> {
        let file =
            File::open(path).with_context(|| format!("could not open {}", path.display()))?;
        let mut lines = BufReader::new(file);
        let begin =
            lines.fill_buf().with_context(|| format!("could not read {}", path.display()))?;
        if !begin.starts_with(Head::BEGIN.as_bytes()) {
            return Ok(None);
        }
        let first = line_of(&mut lines)?;
        let head = Head::parse(&first)
            .with_context(|| format!("{}: \"{first}\" is not the head of a map", path.display()))?;
        Ok(Some(Self { lines, path: path.to_owned(), head, at: 0 }))
    }
}

fn line_of(lines: &mut BufReader<File>) -> Result<String> {
    let mut line = String::new();
    lines.take(LONGEST_LINE).read_line(&mut line)?;
    ensure!(line.ends_with('\n'), "the map ends too early");
    line.pop();
    Ok(line)
}

impl Blocks for Map {
    fn portion(&mut self) -> Result<Vec<Block>> {
        let count = (self.head.blocks() - self.at).min(4096);
        let mut blocks = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let line = line_of(&mut self.lines)
                .with_context(|| format!("could not read {}", self.path.display()))?;
            self.at += 1;
            blocks.push(match line.as_str() {
                "-" => Block::Zero,
                hash => Block::Hash(blake3::Hash::from_hex(hash).map_err(|_| {
                    let (path, at) = (self.path.display(), self.at + 1);
                    anyhow::anyhow!("{path}:{at}: \"{hash}\" is not a hash")
                })?),
            });
        }
        Ok(blocks)
    }
}

/// Blocks of the other side, taken one by one.
struct Other {
    blocks: Box<dyn Blocks>,
    ready: std::vec::IntoIter<Block>,
    head: Head,
}

impl Other {
    fn open(path: &Path, block: u64) -> Result<Self> {
        let (blocks, head): (Box<dyn Blocks>, Head) = match Map::open(path)? {
            Some(map) => {
                let head = map.head;
                (Box::new(map), head)
            }
            None => {
                let image = Image::open(path, block as usize)?;
                let head = Head { bytes: image.bytes, block };
                (Box::new(image), head)
            }
        };
        ensure!(
            head.block == block,
            "{} is a map of blocks of {} bytes; compare with --block-size {}",
            path.display(),
            head.block,
            head.block
        );
        Ok(Self { blocks, ready: Vec::new().into_iter(), head })
    }

    /// `None` past its end.
    fn next(&mut self) -> Result<Option<Block>> {
        if self.ready.len() == 0 {
            self.ready = self.blocks.portion()?.into_iter();
        }
        Ok(self.ready.next())
    }
}

/// In what two sides differ: ranges of blocks, the first ones.
#[derive(Default)]
struct Differences {
    blocks: u64,
    ranges: Vec<(u64, u64)>,
}

impl Differences {
    fn add(&mut self, block: u64) {
        self.blocks += 1;
        if let Some((_, last)) = self.ranges.last_mut()
            && *last + 1 == block
        {
            *last = block;
        } else if self.ranges.len() < LISTED {
            self.ranges.push((block, block));
        }
    }

    /// All blocks from `first` to before `end`.
    fn add_all(&mut self, first: u64, end: u64) {
        if first >= end {
            return;
        }
        self.add(first);
        self.blocks += end - first - 1;
        if let Some((_, last)) = self.ranges.last_mut()
            && *last == first
        {
            *last = end - 1;
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (first, last) in &self.ranges {
            let comma = if text.is_empty() { "" } else { ", " };
            // Writing to a string cannot fail.
            let _ = if first == last {
                write!(text, "{comma}{first}")
            } else {
                write!(text, "{comma}{first}-{last}")
            };
        }
        if self.ranges.len() == LISTED {
            text.push_str(", …");
        }
        text
    }
}

/// What was found.
struct Checked {
    head: Head,
    zero: u64,
    root: RootHash,
    differences: Differences,
}

/// Runs the command; false if the two sides differ.
pub(super) fn run(args: &CheckArgs, json: bool) -> Result<bool> {
    let block = args.block_size.0;
    if !(512..=64 << 20).contains(&block) {
        bail!("a block of {} cannot be; write 512 to 64M", human(block));
    }
    let other = args.compare.as_deref().map(|path| Other::open(path, block)).transpose()?;
    let compared = other.is_some();
    let to_stdout = args.map.as_deref() == Some(Path::new("-"));
    ensure!(!(json && to_stdout), "--json and --map - both write to stdout; give --map a file");
    let mut map = match &args.map {
        Some(_) if to_stdout => Some(Writer { to: Box::new(io::stdout()), file: None }),
        Some(path) => Some(Writer::file(path)?),
        None => None,
    };
    let checked = check(&args.image, block, map.as_mut(), other, json)?;
    if let Some(map) = map {
        map.end(checked.root)?;
    }
    if !to_stdout {
        report(args, &checked, compared, json)?;
    }
    Ok(checked.differences.blocks == 0)
}

fn check(
    path: &Path,
    block: u64,
    mut map: Option<&mut Writer>,
    mut other: Option<Other>,
    json: bool,
) -> Result<Checked> {
    let mut image = Image::open(path, block as usize)?;
    let head = Head { bytes: image.bytes, block };
    let progress = Progress::bytes("hashing", head.bytes, json);
    if let Some(map) = &mut map {
        writeln!(map.to, "{}", head.line())?;
    }
    let (mut at, mut zero, mut differences) = (0, 0, Differences::default());
    let mut same = true;
    while image.left > 0 {
        let blocks = image.portion()?;
        progress.set(head.bytes - image.left, head.bytes);
        for one in blocks {
            zero += u64::from(one == Block::Zero);
            if let Some(map) = &mut map {
                map.block(one)?;
            }
            if let Some(other) = &mut other {
                same = other.next()? == Some(one);
                if !same {
                    differences.add(at);
                }
            }
            at += 1;
        }
    }
    if let Some(other) = &other {
        // A block that only one side has differs, and a last one that is longer there: of zeros,
        // which look the same in any number.
        if same && at > 0 && at == other.head.blocks() && head.bytes != other.head.bytes {
            differences.add(at - 1);
        }
        differences.add_all(at, other.head.blocks());
    }
    let root = RootHash::from(*image.whole.finalize().as_bytes());
    Ok(Checked { head, zero, root, differences })
}

/// Where a map goes.
struct Writer {
    to: Box<dyn Write>,
    /// Where the file lies until it is whole, and where it goes then.
    file: Option<(tempfile::TempPath, PathBuf)>,
}

impl Writer {
    fn file(path: &Path) -> Result<Self> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))
            .with_context(|| format!("could not write beside {}", path.display()))?;
        let (file, temporary) = file.into_parts();
        let to = Box::new(BufWriter::new(file));
        Ok(Self { to, file: Some((temporary, path.to_owned())) })
    }

    fn block(&mut self, block: Block) -> io::Result<()> {
        match block {
            Block::Zero => writeln!(self.to, "-"),
            Block::Hash(hash) => writeln!(self.to, "{}", hash.to_hex()),
        }
    }

    fn end(mut self, root: RootHash) -> Result<()> {
        writeln!(self.to, "root {root}")
            .and_then(|()| self.to.flush())
            .context("could not write")?;
        if let Some((temporary, path)) = self.file {
            temporary
                .persist(&path)
                .with_context(|| format!("could not write {}", path.display()))?;
        }
        Ok(())
    }
}

fn report(args: &CheckArgs, checked: &Checked, compared: bool, json: bool) -> Result<()> {
    let Checked { head, zero, root, differences } = checked;
    let blocks = head.blocks();
    let mut value = serde_json::json!({
        "image": args.image,
        "bytes": head.bytes,
        "block_size": head.block,
        "blocks": blocks,
        "zero_blocks": zero,
        "blake3": root,
    });
    let mut text = format!(
        "image      {} ({})\nroot       {root}\nblocks     {blocks} of {}: {} data, {zero} zero",
        args.image.display(),
        human(head.bytes),
        human(head.block),
        blocks - zero,
    );
    if compared {
        value["different_blocks"] = differences.blocks.into();
        value["different"] = serde_json::json!(differences.ranges);
        text.push_str(&match differences.blocks {
            0 => "\ncompared   the same".to_owned(),
            count => format!("\ncompared   {count} blocks differ: {}", differences.text()),
        });
    }
    print(json, &value, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(image: u64, other: &[u8]) -> Differences {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        File::create(&one).unwrap().set_len(image).unwrap();
        std::fs::write(&two, other).unwrap();
        let other = Other::open(&two, 4096).unwrap();
        check(&one, 4096, None, Some(other), true).unwrap().differences
    }

    #[test]
    fn zeros_of_another_length_differ() {
        assert_eq!(compared(8192, &[0; 8192]).blocks, 0);
        assert_eq!(compared(5000, &[0; 6000]).ranges, [(1, 1)]);
        assert_eq!(compared(5000, &vec![0; 20_000]).ranges, [(2, 4)]);
        assert_eq!(compared(20_000, &[0; 5000]).ranges, [(2, 4)]);
        assert_eq!(compared(0, &[]).blocks, 0);
    }

    #[test]
    fn a_map_of_any_size_is_compared_in_the_time_of_the_image() {
        // As many lines as are read at once.
        let map = format!("{} {} 4096\n{}", Head::BEGIN, u64::MAX, "-\n".repeat(4096));
        let found = compared(4096, map.as_bytes());
        assert_eq!(found.blocks, u64::MAX.div_ceil(4096) - 1);
        assert_eq!(found.ranges, [(1, u64::MAX.div_ceil(4096) - 1)]);
    }
}
