//! The client's handshake: from the server's greeting to an export that takes requests.

use crate::nbd::{
    Endpoint,
    line::{Channel, Input, Line, Output, Socket},
    protocol::{
        CLIENT_FIXED, CLIENT_NO_ZEROES, ERROR_BLOCK_SIZE_REQUIRED, ERROR_INVALID, ERROR_PLATFORM,
        ERROR_POLICY, ERROR_SHUTDOWN, ERROR_TLS_REQUIRED, ERROR_TOO_BIG, ERROR_UNKNOWN,
        ERROR_UNSUPPORTED, ExportFlags, GREETING, INFO_BLOCK_SIZE, Info, OPTION,
        OPTION_REPLY_BYTES, OptionKind, REPLY_ACK, REPLY_INFO, REPLY_META_CONTEXT, SERVER_FIXED,
        SERVER_NO_ZEROES, decode_context, decode_info, decode_option_reply, encode_go,
        encode_meta_context, encode_option,
    },
};
use identity::TlsClient;
use std::{
    io::{self, Read, Write},
    time::Duration,
};

/// The longest reply to an option that is read: an export's description and more.
const MAX_REPLY_BYTES: u32 = 64 << 10;
/// Most replies to one option.
const MAX_REPLIES: usize = 256;
/// What a server that does not say takes at a time (the protocol's own assumption).
const USUAL_PAYLOAD: u32 = 32 << 20;
/// A server that cannot be asked for less than this is of no use.
const MAX_MINIMUM: u32 = 64 << 10;

/// What is known of a server's export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// In bytes.
    pub(super) size: u64,
    pub(super) flags: ExportFlags,
    /// Offsets and lengths must be multiples of this power of two.
    pub(super) minimum: u32,
    /// Longest read or write.
    pub(super) maximum: u32,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// The number under which `base:allocation` is reported, if it is.
    pub(super) allocation: Option<u32>,
}

/// A connection that takes requests.
pub(super) struct Shaken {
    pub(super) facts: Facts,
    pub(super) line: Line,
    pub(super) input: Input,
    pub(super) output: Output,
}

/// What is asked of a server.
pub(super) struct Wish<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) export: &'a str,
    pub(super) tls: Option<&'a TlsClient>,
    /// All of the handshake ends by then.
    pub(super) limit: Duration,
    /// The longest that the server may be silent afterwards, while it owes an answer.
    pub(super) silence: Duration,
}

fn broken(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

/// What the server says to an option.
enum Answer {
    Yes,
    No(u32, String),
}

struct Client<'a> {
    channel: Channel,
    wish: &'a Wish<'a>,
    no_zeroes: bool,
}

/// Connects and shakes hands.
pub(super) fn shake(wish: &Wish<'_>) -> io::Result<Shaken> {
    shake_on(wish.endpoint.connect(wish.limit)?, wish)
}

/// Shakes hands on a connected socket.
pub(super) fn shake_on(socket: Socket, wish: &Wish<'_>) -> io::Result<Shaken> {
    let line = socket.line()?;
    let mut channel =
        Channel::new(socket, wish.limit, "the server did not finish the handshake in time");
    let greeting: [u8; 18] = channel.read_array()?;
    if greeting[..8] != GREETING.to_be_bytes() {
        return Err(broken("what answers there does not speak NBD"));
    }
    if greeting[8..16] != OPTION.to_be_bytes() {
        return Err(broken("the server speaks the oldest NBD (oldstyle), which is not supported"));
    }
    let server = u16::from_be_bytes([greeting[16], greeting[17]]);
    if server & SERVER_FIXED == 0 {
        return Err(broken("the server does not speak fixed newstyle"));
    }
    let no_zeroes = server & SERVER_NO_ZEROES != 0;
    let flags = CLIENT_FIXED | if no_zeroes { CLIENT_NO_ZEROES } else { 0 };
    channel.write_all(&flags.to_be_bytes())?;
    let mut client = Client { channel, wish, no_zeroes };
    if let Some(tls) = wish.tls {
        client = client.start_tls(tls)?;
    }
    let structured = matches!(client.option(OptionKind::StructuredReply, b"")?, Answer::Yes);
    let allocation = if structured { client.choose_allocation()? } else { None };
    let facts = client.go(structured, allocation)?;
    let silence = Some(wish.silence);
    let (input, output) = client.channel.split(silence, silence)?;
    Ok(Shaken { facts, line, input, output })
}

impl Client<'_> {
    /// Asks for something that needs no more than yes or no.
    fn option(&mut self, option: OptionKind, data: &[u8]) -> io::Result<Answer> {
        self.ask(option, data, |_, _| Ok(()))
    }

    /// Asks, and gives every reply before the last one to `hear`.
    fn ask(
        &mut self,
        option: OptionKind,
        data: &[u8],
        mut hear: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<Answer> {
        self.channel.write_all(&encode_option(option, data))?;
        for _ in 0..MAX_REPLIES {
            let header: [u8; OPTION_REPLY_BYTES] = self.channel.read_array()?;
            let (answered, reply, length) = decode_option_reply(&header)
                .ok_or_else(|| broken("the server sent a reply without its magic"))?;
            if answered != option {
                return Err(broken(format!("the server answered {answered:?} to {option:?}")));
            }
            if length > MAX_REPLY_BYTES {
                return Err(broken(format!("the server answers {option:?} with {length} bytes")));
            }
            let mut payload = vec![0; length as usize];
            self.channel.read_exact(&mut payload)?;
            if reply == REPLY_ACK {
                return Ok(Answer::Yes);
            }
            if reply & 1 << 31 != 0 {
                return Ok(Answer::No(reply, printable(&payload)));
            }
            hear(reply, &payload)?;
        }
        Err(broken(format!("the server does not stop answering {option:?}")))
    }

    fn start_tls(mut self, tls: &TlsClient) -> io::Result<Self> {
        if let Answer::No(error, message) = self.option(OptionKind::StartTls, b"")? {
            return Err(refused("TLS", error, &message));
        }
        let channel = self.channel.secure(|socket, limit| tls.connect(socket, limit))?;
        Ok(Self { channel, ..self })
    }

    fn choose_allocation(&mut self) -> io::Result<Option<u32>> {
        let mut chosen = None;
        let wish = encode_meta_context(self.wish.export);
        let answer = self.ask(OptionKind::SetMetaContext, &wish, |reply, data| {
            if reply == REPLY_META_CONTEXT {
                chosen = decode_context(data).or(chosen);
            }
            Ok(())
        })?;
        // A server that does not know the option, or the export (which GO tells better).
        Ok(chosen.filter(|_| matches!(answer, Answer::Yes)))
    }

    fn go(&mut self, structured: bool, allocation: Option<u32>) -> io::Result<Facts> {
        let wish = encode_go(self.wish.export, &[INFO_BLOCK_SIZE]);
        let (mut export, mut sizes) = (None, (1, USUAL_PAYLOAD));
        let answer = self.ask(OptionKind::Go, &wish, |reply, data| {
            if reply != REPLY_INFO {
                return Ok(());
            }
            match decode_info(data).ok_or_else(|| broken("the server's facts are cut short"))? {
                Info::Export { size, flags } => export = Some((size, flags)),
                Info::BlockSize { minimum, maximum } => sizes = (minimum, maximum),
                Info::Other => {}
            }
            Ok(())
        })?;
        match answer {
            Answer::Yes => {}
            Answer::No(ERROR_UNSUPPORTED, _) => export = Some(self.export_name()?),
            Answer::No(error, message) => {
                return Err(refused(&format!("export \"{}\"", self.wish.export), error, &message));
            }
        }
        let (size, flags) = export.ok_or_else(|| broken("the server does not tell the size"))?;
        let (minimum, maximum) = sizes;
        if !minimum.is_power_of_two() || minimum > MAX_MINIMUM || maximum < minimum {
            return Err(broken(format!(
                "the server takes requests of {minimum} to {maximum} bytes, which cannot be used"
            )));
        }
        if i64::try_from(size).is_err() || size % u64::from(minimum) != 0 {
            return Err(broken(format!(
                "the server's device has {size} bytes, and takes requests of {minimum} and more"
            )));
        }
        let maximum = maximum.min(USUAL_PAYLOAD) / minimum * minimum;
        Ok(Facts { size, flags, minimum, maximum, structured, allocation })
    }

    /// The oldest way in, for servers that do not know `GO`.
    fn export_name(&mut self) -> io::Result<(u64, ExportFlags)> {
        let name = self.wish.export.as_bytes();
        self.channel.write_all(&encode_option(OptionKind::ExportName, name))?;
        let size = u64::from_be_bytes(self.channel.read_array()?);
        let flags = ExportFlags(u16::from_be_bytes(self.channel.read_array()?));
        if !self.no_zeroes {
            self.channel.skip(124)?;
        }
        Ok((size, flags))
    }
}

/// A server's own words, fit to be shown.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]);
    text.chars().filter(|c| !c.is_control()).collect()
}

fn refused(what: &str, error: u32, message: &str) -> io::Error {
    let (kind, reason) = match error {
        ERROR_UNSUPPORTED => (io::ErrorKind::Unsupported, "it does not know that"),
        ERROR_POLICY => (io::ErrorKind::PermissionDenied, "it is not allowed"),
        ERROR_INVALID => (io::ErrorKind::InvalidInput, "it says that we ask wrongly"),
        ERROR_PLATFORM => (io::ErrorKind::Unsupported, "it cannot where it runs"),
        ERROR_TLS_REQUIRED => {
            (io::ErrorKind::PermissionDenied, "it wants TLS: give this client certificates")
        }
        ERROR_UNKNOWN => (io::ErrorKind::NotFound, "it has none, or not for us"),
        ERROR_SHUTDOWN => (io::ErrorKind::NotConnected, "it is stopping"),
        ERROR_BLOCK_SIZE_REQUIRED => (io::ErrorKind::InvalidInput, "it wants another block size"),
        ERROR_TOO_BIG => (io::ErrorKind::InvalidInput, "the name is too long for it"),
        _ => (io::ErrorKind::Other, "for a reason that the protocol does not know"),
    };
    let said = if message.is_empty() { String::new() } else { format!(" (\"{message}\")") };
    io::Error::new(kind, format!("the server refuses {what}: {reason}{said}"))
}
