//! Cuts a byte stream into lines, within a bound.
//!
//! The peer is not trusted: a line longer than [`MAX_LINE`] is dropped up to
//! its newline and reported, and never more than that is kept.

use super::MAX_LINE;

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A line without its newline; never empty.
    Text(Vec<u8>),
    /// A line that was longer than allowed ended; its content is gone.
    TooLong,
}

/// Collects bytes and gives lines.
#[derive(Debug, Default)]
pub struct LineReader {
    buffer: Vec<u8>,
    /// Bytes of `buffer` already searched for a newline.
    searched: usize,
    /// The rest of the present line is dropped.
    skipping: bool,
}

impl LineReader {
    /// An empty reader.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what was read. Take all lines ([`LineReader::next_line`]) before adding more: that keeps
    /// the buffer within one line and one read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete line, if there is one. Empty lines are skipped.
    pub fn next_line(&mut self) -> Option<Line> {
        loop {
            let newline = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n');
            let Some(at) = newline.map(|at| at + self.searched) else {
                if self.skipping || self.buffer.len() >= MAX_LINE {
                    self.skipping = true;
                    self.buffer.clear();
                }
                self.searched = self.buffer.len();
                return None;
            };
            let mut line: Vec<u8> = self.buffer.drain(..=at).collect();
            self.searched = 0;
            if std::mem::take(&mut self.skipping) || line.len() > MAX_LINE {
                return Some(Line::TooLong);
            }
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.is_empty() {
                return Some(Line::Text(line));
            }
        }
    }

    /// Forgets a line that has begun: the peer that wrote it is gone.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(reader: &mut LineReader) -> Vec<Line> {
        std::iter::from_fn(|| reader.next_line()).collect()
    }

    #[test]
    fn a_line_of_the_full_length_passes_and_one_byte_more_does_not() {
        let mut reader = LineReader::new();
        let mut full = vec![b'a'; MAX_LINE - 1];
        full.push(b'\n');
        reader.push(&full);
        assert_eq!(lines(&mut reader), [Line::Text(vec![b'a'; MAX_LINE - 1])]);
        full.insert(0, b'a');
        full.extend_from_slice(b"next\n");
        reader.push(&full);
        assert_eq!(lines(&mut reader), [Line::TooLong, Line::Text(b"next".to_vec())]);
    }

    #[test]
    fn an_endless_line_keeps_no_memory_and_the_next_line_is_read() {
        let mut reader = LineReader::new();
        for _ in 0..64 {
            reader.push(&[b'x'; 8192]);
            assert_eq!(lines(&mut reader), []);
            assert!(reader.buffer.len() < MAX_LINE);
        }
        reader.push(b"tail\n{}\n");
        assert_eq!(lines(&mut reader), [Line::TooLong, Line::Text(b"{}".to_vec())]);
    }

    #[test]
    fn a_reset_drops_the_line_that_had_begun() {
        let mut reader = LineReader::new();
        reader.push(b"half of a li");
        assert_eq!(lines(&mut reader), []);
        reader.reset();
        reader.push(b"whole\r\n\n");
        assert_eq!(lines(&mut reader), [Line::Text(b"whole".to_vec())]);
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_the_bytes_arrive(
            texts in proptest::collection::vec("[a-z{}\"]{1,30}", 1..8),
            cuts in proptest::collection::vec(1usize..20, 1..40),
        ) {
            let bytes: Vec<u8> = texts.iter().flat_map(|t| format!("{t}\n").into_bytes()).collect();
            let mut reader = LineReader::new();
            let mut seen = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                reader.push(head);
                seen.extend(lines(&mut reader));
                rest = tail;
            }
            let expected: Vec<Line> = texts.iter().map(|t| Line::Text(t.clone().into_bytes())).collect();
            prop_assert_eq!(seen, expected);
        }
    }
}
