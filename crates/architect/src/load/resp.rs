//! The little of RESP (the Redis protocol, version 2) that the load client speaks: commands as
//! arrays of bulk strings out, and every reply type except arrays in.
//!
//! Written by hand because the client measures the connection itself: it must know when bytes
//! arrived, keep many commands in flight and see a broken stream as it is. Nothing here panics on
//! bytes from outside, and nothing allocates more than [`MAX_BULK`] on the word of a peer.

/// Longest status, error or number line that is accepted, in bytes.
pub(super) const MAX_LINE: usize = 4096;

/// Longest bulk string that is accepted, in bytes.
pub(super) const MAX_BULK: usize = 1 << 20;

/// One answer of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// `+OK`
    Status(String),
    /// `-ERR …`: the command was not executed.
    Error(String),
    /// `:42`
    Integer(i64),
    /// `$5\r\nhello\r\n`
    Bulk(Vec<u8>),
    /// `$-1`: no such key.
    Nil,
}

/// The stream is not RESP (any more): the connection cannot be used further.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum RespError {
    /// A reply starts with a byte that no reply starts with.
    #[error("reply of unknown type {0:#04x}")]
    UnknownType(u8),
    /// A line does not end.
    #[error("a line longer than {MAX_LINE} bytes")]
    LineTooLong,
    /// A number that is none.
    #[error("\"{0}\" where a number was expected")]
    NotANumber(String),
    /// A string longer than we ever stored.
    #[error("a bulk string of {0} bytes, more than {MAX_BULK}")]
    BulkTooLong(i64),
    /// A bulk string without its end.
    #[error("a bulk string that does not end in CR LF")]
    Unterminated,
}

/// Appends one command to `out`.
pub(super) fn encode(out: &mut Vec<u8>, parts: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", parts.len()).as_bytes());
    for part in parts {
        out.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
    }
}

/// Takes bytes as they come and gives whole replies.
#[derive(Default)]
pub(super) struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// Bytes from the connection.
    pub(super) fn extend(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole reply, or `None` until more bytes come.
    pub(super) fn next_reply(&mut self) -> Result<Option<Reply>, RespError> {
        let rest = &self.buffer[self.taken..];
        let Some(&kind) = rest.first() else { return Ok(None) };
        if !matches!(kind, b'+' | b'-' | b':' | b'$') {
            return Err(RespError::UnknownType(kind));
        }
        let Some(length) = rest[1..].iter().position(|&byte| byte == b'\n') else {
            return if rest.len() > MAX_LINE { Err(RespError::LineTooLong) } else { Ok(None) };
        };
        if length > MAX_LINE {
            return Err(RespError::LineTooLong);
        }
        let line = &rest[1..=length];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let line = String::from_utf8_lossy(line).into_owned();
        let after = length + 2;
        let (reply, used) = match kind {
            b'+' => (Reply::Status(line), after),
            b'-' => (Reply::Error(line), after),
            b':' => (Reply::Integer(number(line)?), after),
            _ => match number(line)? {
                -1 => (Reply::Nil, after),
                bytes if bytes < 0 || bytes > MAX_BULK as i64 => {
                    return Err(RespError::BulkTooLong(bytes));
                }
                bytes => {
                    let end = after + bytes as usize;
                    let Some(tail) = rest.get(end..end + 2) else { return Ok(None) };
                    if tail != b"\r\n" {
                        return Err(RespError::Unterminated);
                    }
                    (Reply::Bulk(rest[after..end].to_vec()), end + 2)
                }
            },
        };
        self.taken += used;
        Ok(Some(reply))
    }
}

fn number(line: String) -> Result<i64, RespError> {
    line.parse().map_err(|_| RespError::NotANumber(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"+OK\r\n:41\r\n$5\r\nhe\r\no\r\n$-1\r\n-ERR no\r\n$0\r\n\r\n";

    fn expected() -> Vec<Reply> {
        vec![
            Reply::Status("OK".into()),
            Reply::Integer(41),
            Reply::Bulk(b"he\r\no".to_vec()),
            Reply::Nil,
            Reply::Error("ERR no".into()),
            Reply::Bulk(Vec::new()),
        ]
    }

    #[test]
    fn replies_cut_at_any_byte_decode_the_same() {
        for cut in 0..=STREAM.len() {
            let mut decoder = Decoder::default();
            let mut replies = Vec::new();
            for piece in [&STREAM[..cut], &STREAM[cut..]] {
                decoder.extend(piece);
                while let Some(reply) = decoder.next_reply().unwrap() {
                    replies.push(reply);
                }
            }
            assert_eq!(replies, expected(), "cut at {cut}");
        }
    }

    #[test]
    fn a_command_is_encoded_as_redis_documents_it() {
        let mut out = Vec::new();
        encode(&mut out, &[b"SET", b"k", b"a\r\nb"]);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\na\r\nb\r\n");
    }

    #[test]
    fn hostile_replies_are_refused_without_a_panic() {
        let long_line = [b"+".as_slice(), &vec![b'a'; MAX_LINE + 8]].concat();
        for (bytes, error) in [
            (b"*1\r\n".as_slice(), RespError::UnknownType(b'*')),
            (b"$99999999999\r\n", RespError::BulkTooLong(99_999_999_999)),
            (b"$-2\r\n", RespError::BulkTooLong(-2)),
            (b"$1\r\nabc", RespError::Unterminated),
            (b":one\r\n", RespError::NotANumber("one".into())),
            (&long_line, RespError::LineTooLong),
        ] {
            let mut decoder = Decoder::default();
            decoder.extend(bytes);
            assert_eq!(decoder.next_reply(), Err(error));
        }
    }
}
