//! Reads a Debian package: an `ar` archive with a compressed tar in it.

use crate::package::{
    compression,
    error::{Attempt, PackageError, Result},
    files,
};
use std::{
    io::{self, BufReader, Read},
    path::Path,
};

const MAGIC: &[u8] = b"!<arch>\n";
const HEADER: usize = 60;

/// The files that the package would install, as a tar stream.
///
/// # Errors
/// When the file is no Debian package.
pub(crate) fn data(path: &Path) -> Result<Box<dyn Read>> {
    let wrong = |problem: &str| PackageError::Input {
        input: format!("Debian package {}", path.display()),
        problem: format!("{problem}; delete it and build again to download it anew"),
    };
    let attempt = || format!("reading {}", path.display());
    let file = files::open(path)?;
    let mut left = file.metadata().attempt(attempt)?.len();
    let mut file = BufReader::new(file);
    let mut magic = [0; MAGIC.len()];
    let count = files::read_full(&mut file, &mut magic).attempt(attempt)?;
    if magic[..count] != *MAGIC {
        return Err(wrong("is not an ar archive"));
    }
    left -= count as u64;
    loop {
        let mut header = [0; HEADER];
        match files::read_full(&mut file, &mut header).attempt(attempt)? {
            0 => return Err(wrong("has no data.tar")),
            HEADER => {}
            _ => return Err(wrong("is truncated")),
        }
        let field = |range: std::ops::Range<usize>| {
            String::from_utf8_lossy(&header[range]).trim().trim_end_matches('/').to_owned()
        };
        let name = field(0..16);
        let bytes: u64 =
            field(48..58).parse().map_err(|_| wrong("has a member without a length"))?;
        left = left.saturating_sub(HEADER as u64);
        if bytes > left {
            return Err(wrong("is truncated"));
        }
        if name.starts_with("data.tar") {
            return compression::decoder(file.take(bytes)).attempt(attempt);
        }
        // Members begin at even offsets.
        let skip = bytes.next_multiple_of(2);
        io::copy(&mut (&mut file).take(skip), &mut io::sink()).attempt(attempt)?;
        left = left.saturating_sub(skip);
    }
}

/// A Debian package with the given data, for tests.
#[cfg(test)]
pub(crate) fn make(data: &[u8]) -> Vec<u8> {
    let mut deb = MAGIC.to_vec();
    let packed = zstd::encode_all(data, 1).unwrap();
    for (name, content) in [("debian-binary", &b"2.0\n1"[..]), ("data.tar.zst", &packed)] {
        let bytes = content.len();
        deb.extend(
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{bytes:<10}`\n", 0, 0, 0, 100_644).bytes(),
        );
        deb.extend(content);
        deb.resize(deb.len().next_multiple_of(2), b'\n');
    }
    deb
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_comes_out_and_damage_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.deb");
        let whole = make(b"the data");
        std::fs::write(&path, &whole).unwrap();
        let mut content = Vec::new();
        data(&path).unwrap().read_to_end(&mut content).unwrap();
        assert_eq!(content, b"the data");
        for end in 0..whole.len() - 1 {
            std::fs::write(&path, &whole[..end]).unwrap();
            let read = data(&path).map(|mut data| data.read_to_end(&mut Vec::new()));
            assert!(!matches!(read, Ok(Ok(_))), "cut at {end}");
        }
    }
}
