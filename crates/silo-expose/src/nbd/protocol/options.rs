//! The handshake: greeting, options and what answers them.

use super::{ALLOCATION, ALLOCATION_ID, u16_at, u32_at, u64_at};

/// Bytes that open a connection, first half.
pub(in crate::nbd) const GREETING: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Bytes that open a connection, second half, and those that start every option.
pub(in crate::nbd) const OPTION: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// The server speaks fixed newstyle.
pub(in crate::nbd) const SERVER_FIXED: u16 = 1;
/// The server can leave out the padding after `EXPORT_NAME`.
pub(in crate::nbd) const SERVER_NO_ZEROES: u16 = 2;
/// The client agrees to fixed newstyle.
pub(in crate::nbd) const CLIENT_FIXED: u32 = 1;
/// The client wants no padding.
pub(in crate::nbd) const CLIENT_NO_ZEROES: u32 = 2;

pub(in crate::nbd) const REPLY_ACK: u32 = 1;
pub(in crate::nbd) const REPLY_SERVER: u32 = 2;
pub(in crate::nbd) const REPLY_INFO: u32 = 3;
pub(in crate::nbd) const REPLY_META_CONTEXT: u32 = 4;
pub(in crate::nbd) const ERROR_UNSUPPORTED: u32 = 0x8000_0001;
pub(in crate::nbd) const ERROR_POLICY: u32 = 0x8000_0002;
pub(in crate::nbd) const ERROR_INVALID: u32 = 0x8000_0003;
pub(in crate::nbd) const ERROR_PLATFORM: u32 = 0x8000_0004;
pub(in crate::nbd) const ERROR_TLS_REQUIRED: u32 = 0x8000_0005;
pub(in crate::nbd) const ERROR_UNKNOWN: u32 = 0x8000_0006;
pub(in crate::nbd) const ERROR_SHUTDOWN: u32 = 0x8000_0007;
pub(in crate::nbd) const ERROR_BLOCK_SIZE_REQUIRED: u32 = 0x8000_0008;
pub(in crate::nbd) const ERROR_TOO_BIG: u32 = 0x8000_0009;

pub(in crate::nbd) const INFO_EXPORT: u16 = 0;
pub(in crate::nbd) const INFO_NAME: u16 = 1;
pub(in crate::nbd) const INFO_DESCRIPTION: u16 = 2;
pub(in crate::nbd) const INFO_BLOCK_SIZE: u16 = 3;

/// Bytes of an option's header.
pub(in crate::nbd) const OPTION_BYTES: usize = 16;
/// Bytes of the header of an option's reply.
pub(in crate::nbd) const OPTION_REPLY_BYTES: usize = 20;

/// What an export can do: the transmission flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) struct ExportFlags(pub(in crate::nbd) u16);

impl ExportFlags {
    /// Always there.
    const PRESENT: u16 = 1;
    pub(in crate::nbd) const READ_ONLY: u16 = 1 << 1;
    pub(in crate::nbd) const FLUSH: u16 = 1 << 2;
    pub(in crate::nbd) const FUA: u16 = 1 << 3;
    pub(in crate::nbd) const TRIM: u16 = 1 << 5;
    pub(in crate::nbd) const WRITE_ZEROES: u16 = 1 << 6;
    pub(in crate::nbd) const DONT_FRAGMENT: u16 = 1 << 7;
    /// A flush on one connection covers what was answered on the others.
    pub(in crate::nbd) const MULTI_CONN: u16 = 1 << 8;
    pub(in crate::nbd) const CACHE: u16 = 1 << 10;
    pub(in crate::nbd) const FAST_ZERO: u16 = 1 << 11;

    /// What our exports can do.
    pub(in crate::nbd) const fn ours(read_only: bool, structured: bool) -> Self {
        let mut flags = Self::PRESENT | Self::FLUSH | Self::MULTI_CONN | Self::CACHE;
        flags |= if read_only {
            Self::READ_ONLY
        } else {
            Self::FUA | Self::TRIM | Self::WRITE_ZEROES | Self::FAST_ZERO
        };
        if structured {
            flags |= Self::DONT_FRAGMENT;
        }
        Self(flags)
    }

    pub(in crate::nbd) const fn has(self, flag: u16) -> bool {
        self.0 & flag != 0
    }
}

/// Options that a client may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum OptionKind {
    ExportName,
    Abort,
    List,
    StartTls,
    Info,
    Go,
    StructuredReply,
    ListMetaContext,
    SetMetaContext,
    /// Anything else, by number.
    Other(u32),
}

impl OptionKind {
    pub(in crate::nbd) const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::ExportName,
            2 => Self::Abort,
            3 => Self::List,
            5 => Self::StartTls,
            6 => Self::Info,
            7 => Self::Go,
            8 => Self::StructuredReply,
            9 => Self::ListMetaContext,
            10 => Self::SetMetaContext,
            other => Self::Other(other),
        }
    }

    pub(in crate::nbd) const fn number(self) -> u32 {
        match self {
            Self::ExportName => 1,
            Self::Abort => 2,
            Self::List => 3,
            Self::StartTls => 5,
            Self::Info => 6,
            Self::Go => 7,
            Self::StructuredReply => 8,
            Self::ListMetaContext => 9,
            Self::SetMetaContext => 10,
            Self::Other(number) => number,
        }
    }
}

/// An option's header; `None` if the magic is wrong.
pub(in crate::nbd) fn decode_option(bytes: &[u8; OPTION_BYTES]) -> Option<(OptionKind, u32)> {
    (u64_at(bytes, 0) == OPTION)
        .then(|| (OptionKind::from_number(u32_at(bytes, 8)), u32_at(bytes, 12)))
}

/// An option as a client sends it.
pub(in crate::nbd) fn encode_option(option: OptionKind, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.number().to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// An option's reply.
pub(in crate::nbd) fn encode_option_reply(option: OptionKind, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_REPLY_BYTES + data.len());
    bytes.extend_from_slice(&OPTION_REPLY.to_be_bytes());
    bytes.extend_from_slice(&option.number().to_be_bytes());
    bytes.extend_from_slice(&reply.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// The header of an option's reply: which option, what kind of reply, how many bytes follow.
/// `None` if the magic is wrong.
pub(in crate::nbd) fn decode_option_reply(
    bytes: &[u8; OPTION_REPLY_BYTES],
) -> Option<(OptionKind, u32, u32)> {
    (u64_at(bytes, 0) == OPTION_REPLY)
        .then(|| (OptionKind::from_number(u32_at(bytes, 8)), u32_at(bytes, 12), u32_at(bytes, 16)))
}

/// Splits a string with its length in front off `data`.
pub(in crate::nbd) fn split_string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_at_checked(4)?;
    rest.split_at_checked(u32_at(length, 0) as usize)
}

fn push_string(bytes: &mut Vec<u8>, text: &[u8]) {
    bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
    bytes.extend_from_slice(text);
}

/// The payload of `INFO` and `GO`: the export's name and what the client asks to be told. `None` if
/// the lengths inside do not add up.
pub(in crate::nbd) fn decode_go(data: &[u8]) -> Option<(&[u8], impl Iterator<Item = u16>)> {
    let (name, rest) = split_string(data)?;
    let (count, infos) = rest.split_at_checked(2)?;
    (infos.len() == usize::from(u16_at(count, 0)) * 2)
        .then(|| (name, infos.chunks_exact(2).map(|info| u16_at(info, 0))))
}

/// The payload of a client's `INFO` or `GO`.
pub(in crate::nbd) fn encode_go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_string(&mut bytes, name.as_bytes());
    bytes.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        bytes.extend_from_slice(&info.to_be_bytes());
    }
    bytes
}

/// `NBD_INFO_EXPORT`.
pub(in crate::nbd) fn encode_info_export(size: u64, flags: ExportFlags) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..2].copy_from_slice(&INFO_EXPORT.to_be_bytes());
    bytes[2..10].copy_from_slice(&size.to_be_bytes());
    bytes[10..].copy_from_slice(&flags.0.to_be_bytes());
    bytes
}

/// `NBD_INFO_NAME` or `NBD_INFO_DESCRIPTION`.
pub(in crate::nbd) fn encode_info_text(info: u16, text: &str) -> Vec<u8> {
    [&info.to_be_bytes(), text.as_bytes()].concat()
}

/// `NBD_INFO_BLOCK_SIZE`.
pub(in crate::nbd) fn encode_info_block_size(
    minimum: u32,
    preferred: u32,
    maximum: u32,
) -> [u8; 14] {
    let mut bytes = [0; 14];
    bytes[..2].copy_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    bytes[2..6].copy_from_slice(&minimum.to_be_bytes());
    bytes[6..10].copy_from_slice(&preferred.to_be_bytes());
    bytes[10..].copy_from_slice(&maximum.to_be_bytes());
    bytes
}

/// What a server tells of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nbd) enum Info {
    Export { size: u64, flags: ExportFlags },
    BlockSize { minimum: u32, maximum: u32 },
    Other,
}

/// The payload of `REPLY_INFO`; `None` if it is cut short.
pub(in crate::nbd) fn decode_info(data: &[u8]) -> Option<Info> {
    let (kind, rest) = data.split_at_checked(2)?;
    match (u16_at(kind, 0), rest.len()) {
        (INFO_EXPORT, 10) => {
            Some(Info::Export { size: u64_at(rest, 0), flags: ExportFlags(u16_at(rest, 8)) })
        }
        (INFO_BLOCK_SIZE, 12) => {
            Some(Info::BlockSize { minimum: u32_at(rest, 0), maximum: u32_at(rest, 8) })
        }
        (INFO_EXPORT | INFO_BLOCK_SIZE, _) => None,
        _ => Some(Info::Other),
    }
}

/// One entry of `LIST`: name and description.
pub(in crate::nbd) fn encode_list_entry(name: &str, description: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_string(&mut bytes, name.as_bytes());
    bytes.extend_from_slice(description.as_bytes());
    bytes
}

/// The payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`: the export's name, and whether the
/// queries (at most 64 KiB of them) ask for `base:allocation`. `listing`: no query at all, and the
/// query for a whole namespace, ask for it too. `None` if the lengths inside do not add up.
pub(in crate::nbd) fn decode_meta_context(data: &[u8], listing: bool) -> Option<(&[u8], bool)> {
    let (name, rest) = split_string(data)?;
    let (count, mut rest) = rest.split_at_checked(4)?;
    let count = u32_at(count, 0);
    let mut wanted = listing && count == 0;
    for _ in 0..count {
        // Each takes at least four bytes of `data`, or ends the loop.
        let (query, more) = split_string(rest)?;
        wanted |= query == ALLOCATION || listing && query == b"base:";
        rest = more;
    }
    rest.is_empty().then_some((name, wanted))
}

/// A client's wish for `base:allocation`.
pub(in crate::nbd) fn encode_meta_context(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_string(&mut bytes, name.as_bytes());
    bytes.extend_from_slice(&1u32.to_be_bytes());
    push_string(&mut bytes, ALLOCATION);
    bytes
}

/// The answer that names the context and its number.
pub(in crate::nbd) fn encode_context() -> Vec<u8> {
    [&ALLOCATION_ID.to_be_bytes(), ALLOCATION].concat()
}

/// The number under which a server will report `base:allocation`; `None` for other contexts.
pub(in crate::nbd) fn decode_context(data: &[u8]) -> Option<u32> {
    let (id, name) = data.split_at_checked(4)?;
    (name == ALLOCATION).then(|| u32_at(id, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshake_messages_have_these_bytes() {
        assert_eq!(GREETING.to_be_bytes(), *b"NBDMAGIC");
        let option = *b"IHAVEOPT\0\0\0\x07\0\0\0\x0e";
        assert_eq!(decode_option(&option), Some((OptionKind::Go, 14)));
        assert_eq!(decode_option(b"IHAVEOPS\0\0\0\x07\0\0\0\x0e"), None);
        let flags = ExportFlags::ours(false, false);
        assert_eq!(
            encode_option_reply(OptionKind::Go, REPLY_INFO, &encode_info_export(0x10_0000, flags)),
            b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07\0\0\0\x03\0\0\0\x0c\
              \0\0\0\0\0\0\0\x10\0\0\x0d\x6d"
        );
        assert_eq!(ExportFlags::ours(true, true).0, 0x587);
        assert_eq!(
            encode_info_block_size(1, 4096, 2 << 20),
            *b"\0\x03\0\0\0\x01\0\0\x10\0\0\x20\0\0"
        );
        let reply = encode_option_reply(OptionKind::Other(4242), ERROR_UNSUPPORTED, b"");
        assert_eq!(reply, b"\x00\x03\xe8\x89\x04\x55\x65\xa9\0\0\x10\x92\x80\0\0\x01\0\0\0\0");
        let header = reply.as_slice().try_into().unwrap();
        assert_eq!(
            decode_option_reply(header),
            Some((OptionKind::Other(4242), ERROR_UNSUPPORTED, 0))
        );
        for number in 0..20 {
            assert_eq!(OptionKind::from_number(number).number(), number);
        }
        assert_eq!(encode_option(OptionKind::Abort, b""), b"IHAVEOPT\0\0\0\x02\0\0\0\0");
        assert_eq!(encode_list_entry("hd", "a disk"), b"\0\0\0\x02hda disk");
    }

    #[test]
    fn a_go_whose_lengths_do_not_add_up_is_refused() {
        let go = |data: &[u8]| {
            decode_go(data).map(|(name, infos)| (name.to_vec(), infos.collect::<Vec<_>>()))
        };
        assert_eq!(go(b"\0\0\0\x02hd\0\x01\0\x03"), Some((b"hd".to_vec(), vec![3])));
        assert_eq!(go(b"\0\0\0\0\0\0"), Some((vec![], vec![])));
        assert_eq!(go(&encode_go("hd", &[3, 2])), Some((b"hd".to_vec(), vec![3, 2])));
        for bad in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\x03hd",
            b"\0\0\0\x02hd\0",
            b"\0\0\0\x02hd\0\x02\0\x03",
            b"\0\0\0\x02hd\0\0\0",
            b"\xff\xff\xff\xffhd\0\0",
        ] {
            assert_eq!(go(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn contexts_are_asked_for_by_name_or_by_namespace() {
        let query = |text: &[u8]| {
            let mut bytes = b"\0\0\0\x02hd\0\0\0\x02\0\0\0\x01x".to_vec();
            push_string(&mut bytes, text);
            bytes
        };
        for (text, listing, wanted) in [
            (&b"base:allocation"[..], false, true),
            (b"base:allocation", true, true),
            (b"base:", false, false),
            (b"base:", true, true),
            (b"qemu:dirty-bitmap:x", true, false),
        ] {
            let query = query(text);
            let found = decode_meta_context(&query, listing);
            assert_eq!(found, Some((&b"hd"[..], wanted)), "{text:?}");
        }
        assert_eq!(decode_meta_context(b"\0\0\0\0\0\0\0\0", true), Some((&b""[..], true)));
        assert_eq!(decode_meta_context(&encode_meta_context(""), false), Some((&b""[..], true)));
        for bad in [&b""[..], b"\0\0\0\0", b"\0\0\0\0\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0x"] {
            assert_eq!(decode_meta_context(bad, false), None, "{bad:?}");
        }
        assert_eq!(decode_context(&encode_context()), Some(ALLOCATION_ID));
        assert_eq!(decode_context(b"\0\0\0\x09other:one"), None);
    }
}
