//! Reading and writing the bytes of stored objects: fixed integers little-endian, other numbers as
//! LEB128 of at most 10 bytes. Every read is checked against the end; nothing is allocated by a
//! length that was read before the bytes are known to be there.

use std::cell::RefCell;
use zstd::bulk::Decompressor;

/// Why bytes are not what they should be: a clause for an error message.
pub(crate) type Malformed = &'static str;

/// A cursor over bytes from outside.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or("it ends too early")?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or("it ends too early")?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err("a number is too large");
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number does not end")
    }

    /// A number that must be at most `max`.
    pub(crate) fn bounded(&mut self, max: u64) -> Result<u64, Malformed> {
        let value = self.varint()?;
        if value > max { Err("a number is out of bounds") } else { Ok(value) }
    }

    /// A count of things that take at least `each` bytes in the rest: bounded by what is there.
    pub(crate) fn count(&mut self, each: usize) -> Result<usize, Malformed> {
        let value = self.varint()?;
        let most = self.left() / each.max(1);
        if value > most as u64 {
            return Err("a count is larger than what follows");
        }
        Ok(value as usize)
    }

    /// A text of at most `max` bytes.
    pub(crate) fn text(&mut self, max: u64) -> Result<&'a str, Malformed> {
        let length = self.bounded(max)? as usize;
        std::str::from_utf8(self.bytes(length)?).map_err(|_| "a text is not UTF-8")
    }

    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err("something follows the end") }
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_text(out: &mut Vec<u8>, text: &str) {
    put_varint(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

/// Signed to unsigned, small numbers of either sign staying small.
pub(crate) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

thread_local! {
    /// Making one for each chunk of 64 KiB is a third of what decompressing it costs.
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decompresses what must come out as at most `max` bytes.
pub(crate) fn unzstd(bytes: &[u8], max: usize) -> Result<Vec<u8>, Malformed> {
    let claimed = zstd::zstd_safe::get_frame_content_size(bytes)
        .ok()
        .flatten()
        .ok_or("its compressed part does not say its size")?;
    if claimed > max as u64 {
        return Err("its compressed part is larger than it can be");
    }
    let decompress = |decompressor: &RefCell<Option<Decompressor<'static>>>| {
        let mut place = decompressor.borrow_mut();
        let decompressor = match &mut *place {
            Some(known) => known,
            None => place.insert(Decompressor::new()?),
        };
        decompressor.decompress(bytes, claimed as usize)
    };
    let out =
        DECOMPRESSOR.with(decompress).map_err(|_| "its compressed part does not decompress")?;
    if out.len() as u64 != claimed {
        return Err("its compressed part has another size than it says");
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_come_back(value: u64, signed: i64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            put_varint(&mut out, zigzag(signed));
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.varint().unwrap(), value);
            prop_assert_eq!(unzigzag(reader.varint().unwrap()), signed);
            prop_assert!(reader.end().is_ok());
        }
    }

    #[test]
    fn numbers_that_are_too_long_or_cut_are_refused() {
        assert!(Reader::new(&[0xff; 9]).varint().is_err());
        assert!(
            Reader::new(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2])
                .varint()
                .is_err()
        );
        assert!(Reader::new(&[0x80; 11]).varint().is_err());
        assert!(Reader::new(&[200, 1]).count(1).is_err());
    }

    #[test]
    fn a_compressed_part_that_claims_too_much_is_refused_before_anything_is_allocated() {
        let bomb = zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap();
        assert!(unzstd(&bomb, (1 << 20) - 1).is_err());
        assert_eq!(unzstd(&bomb, 1 << 20).unwrap().len(), 1 << 20);
        assert!(unzstd(b"junk", 10).is_err());
    }
}
