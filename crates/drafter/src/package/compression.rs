//! Decoders for what kernels, modules, Debian packages and image layers come in, chosen by magic.

use std::io::{self, BufRead, Cursor, Read};

/// A block of the legacy LZ4 frame holds at most this much after decoding.
const LZ4_BLOCK: usize = 8 << 20;

/// Enough for the largest dictionary of a preset (64 MiB); a hostile header cannot ask for more.
const XZ_MEMORY_KIB: u32 = 256 << 10;

const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// How data is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Xz,
    Zstd,
    /// What `lz4 -l` writes and the kernel's build uses.
    Lz4Legacy,
    Unknown,
}

impl Compression {
    /// By the first bytes.
    pub(crate) fn of(begin: &[u8]) -> Self {
        match begin {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4Legacy,
            _ => Self::Unknown,
        }
    }
}

/// What `reader` yields, decoded if its beginning says that it is compressed, else as it is.
pub(crate) fn decoder<'a>(mut reader: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut begin = [0; 6];
    let count = super::files::read_full(&mut reader, &mut begin)?;
    let kind = Compression::of(&begin[..count]);
    let all = io::BufReader::with_capacity(
        256 << 10,
        Cursor::new(begin).take(count as u64).chain(reader),
    );
    Ok(match kind {
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(all)),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(all, true, XZ_MEMORY_KIB)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(all)?),
        Compression::Lz4Legacy => Box::new(Lz4Legacy::new(all)),
        Compression::Unknown => Box::new(all),
    })
}

/// Decodes a legacy LZ4 frame: the magic, then blocks, each behind its compressed length.
struct Lz4Legacy<R> {
    reader: R,
    block: Vec<u8>,
    at: usize,
}

impl<R: BufRead> Lz4Legacy<R> {
    fn new(reader: R) -> Self {
        Self { reader, block: Vec::new(), at: 0 }
    }

    /// Decodes the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut word = [0; 4];
        loop {
            if self.reader.fill_buf()?.is_empty() {
                return Ok(false);
            }
            self.reader.read_exact(&mut word)?;
            // A magic may come again where frames were joined.
            if word != LZ4_LEGACY_MAGIC {
                break;
            }
        }
        let length = u32::from_le_bytes(word) as usize;
        if length == 0 || length > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK) {
            return Err(invalid(format!("an LZ4 block of {length} bytes")));
        }
        let mut compressed = vec![0; length];
        self.reader.read_exact(&mut compressed)?;
        self.block.resize(LZ4_BLOCK, 0);
        let decoded = lz4_flex::block::decompress_into(&compressed, &mut self.block)
            .map_err(|error| invalid(error.to_string()))?;
        self.block.truncate(decoded);
        self.at = 0;
        Ok(true)
    }
}

impl<R: BufRead> Read for Lz4Legacy<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let count = buffer.len().min(self.block.len() - self.at);
        buffer[..count].copy_from_slice(&self.block[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

fn invalid(detail: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail)
}

/// A legacy LZ4 frame of `data`, for tests.
#[cfg(test)]
pub(crate) fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let mut frame = LZ4_LEGACY_MAGIC.to_vec();
    for chunk in data.chunks(LZ4_BLOCK) {
        let block = lz4_flex::block::compress(chunk);
        frame.extend((block.len() as u32).to_le_bytes());
        frame.extend(block);
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn sample() -> Vec<u8> {
        (0..20_000_000u32).map(|i| (i / 1000 % 251) as u8 ^ (i % 7) as u8).collect()
    }

    fn decode(data: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decoder(data)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_compression_is_found_by_its_magic_and_undone() {
        let data = sample();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&data).unwrap();
        let zstd = zstd::encode_all(&*data, 1).unwrap();
        for packed in [gzip.finish().unwrap(), zstd, lz4_legacy(&data)] {
            assert!(packed.len() < data.len() / 2);
            assert_eq!(decode(&packed).unwrap(), data);
        }
        assert_eq!(decode(&data[1..]).unwrap(), data[1..]);
        assert_eq!(decode(b"abc").unwrap(), b"abc");
    }

    /// What `printf 'a module\\n' | xz -9` wrote.
    const XZ: &str = "fd377a585a000004e6d6b446020021011c00000010cf58cc01000861206d6f64756c650a\
                      00000000eeeddf2035ab8836000121096c18c5d51fb6f37d010000000004595a";

    #[test]
    fn xz_as_debian_writes_it_is_read_whole_or_not_at_all() {
        let packed: Vec<u8> = (0..XZ.len() / 2)
            .map(|i| u8::from_str_radix(&XZ[i * 2..i * 2 + 2], 16).unwrap())
            .collect();
        assert_eq!(decode(&packed).unwrap(), b"a module\n");
        assert!(decode(&packed[..packed.len() - 20]).is_err());
    }

    #[test]
    fn truncated_data_is_an_error_in_every_compression() {
        let data = sample();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&data).unwrap();
        let zstd = zstd::encode_all(&*data, 1).unwrap();
        for packed in [gzip.finish().unwrap(), zstd, lz4_legacy(&data)] {
            assert!(decode(&packed[..packed.len() - 5]).is_err());
        }
    }
}
