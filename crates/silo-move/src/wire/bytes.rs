//! Numbers, lists and texts in little-endian bytes, with every bound checked on the way in.

use super::WireError;

/// Writes.
#[derive(Default)]
pub(crate) struct Put(pub(crate) Vec<u8>);

impl Put {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// A length and bytes.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.u32(bytes.len() as u32);
        self.raw(bytes);
    }

    /// A text, cut at `most` bytes (at a character).
    pub(crate) fn text(&mut self, text: &str, most: usize) {
        let mut end = text.len().min(most);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&text.as_bytes()[..end]);
    }

    /// A count and items.
    pub(crate) fn list<T>(&mut self, items: &[T], mut put: impl FnMut(&mut Self, &T)) {
        self.u32(items.len() as u32);
        items.iter().for_each(|item| put(self, item));
    }
}

/// Reads what [`Put`] wrote, or anything else.
pub(crate) struct Take<'a>(pub(crate) &'a [u8]);

impl<'a> Take<'a> {
    pub(crate) fn raw(&mut self, length: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self
            .0
            .split_at_checked(length)
            .ok_or_else(|| WireError::Invalid("a message is cut short".to_owned()))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        self.raw(N).map(super::array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn hash(&mut self) -> Result<[u8; 32], WireError> {
        self.array()
    }

    pub(crate) fn id(&mut self) -> Result<[u8; 16], WireError> {
        self.array()
    }

    pub(crate) fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(WireError::Invalid(format!("{other} where yes or no is expected"))),
        }
    }

    /// A length and bytes, at most `most`.
    pub(crate) fn bytes(&mut self, most: usize) -> Result<&'a [u8], WireError> {
        let length = self.u32()? as usize;
        if length > most {
            return Err(WireError::Invalid(format!("{length} bytes where {most} are allowed")));
        }
        self.raw(length)
    }

    pub(crate) fn text(&mut self, most: usize) -> Result<String, WireError> {
        let text = std::str::from_utf8(self.bytes(most)?);
        text.map(str::to_owned).map_err(|_| WireError::Invalid("a text that is not UTF-8".into()))
    }

    /// A count of at most `most`, and items of at least `size` bytes each.
    pub(crate) fn list<T>(
        &mut self,
        most: usize,
        size: usize,
        mut take: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.u32()? as usize;
        if count > most || count * size > self.0.len() {
            return Err(WireError::Invalid(format!("a list of {count} items")));
        }
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(take(self)?);
        }
        Ok(items)
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(WireError::Invalid(format!("a message with {} bytes behind its end", self.0.len())))
    }
}
