//! The server's handshake: fixed newstyle under a deadline, from the greeting to the moment when
//! requests follow.
//!
//! ```text
//!  greeting → (option → replies)* → GO or EXPORT_NAME → requests
//!                   │
//!                   └ STARTTLS → TLS handshake → everything said before is forgotten
//! ```

use super::{
    Export, Exports, MAX_PAYLOAD, MIN_BLOCK, PREFERRED_BLOCK,
    export::MAX_TEXT,
    line::Channel,
    protocol::{
        CLIENT_FIXED, CLIENT_NO_ZEROES, ERROR_INVALID, ERROR_POLICY, ERROR_TLS_REQUIRED,
        ERROR_TOO_BIG, ERROR_UNKNOWN, ERROR_UNSUPPORTED, ExportFlags, GREETING, INFO_DESCRIPTION,
        INFO_NAME, OPTION, OPTION_BYTES, OptionKind, REPLY_ACK, REPLY_INFO, REPLY_META_CONTEXT,
        REPLY_SERVER, SERVER_FIXED, SERVER_NO_ZEROES, decode_go, decode_meta_context,
        decode_option, encode_context, encode_info_block_size, encode_info_export,
        encode_info_text, encode_list_entry, encode_option_reply,
    },
};
use identity::TlsServer;
use std::{
    io::{self, Read, Write},
    sync::Arc,
};

/// The most options that a client may ask for; QEMU asks for four.
const MAX_OPTIONS: usize = 64;
/// The longest option that is read: a name of 4096 bytes, a query as long, and what goes with them.
const MAX_OPTION_BYTES: usize = 2 * MAX_TEXT + 256;
/// The longest option that is skipped to answer that it is too long.
const MAX_SKIPPED_BYTES: u32 = 1 << 20;

/// Whether a server protects its line.
#[derive(Clone, Debug, Default)]
pub enum NbdSecurity {
    /// There is no TLS: for a unix socket, or a network that is trusted as a whole.
    #[default]
    Plain,
    /// A client may ask for TLS. A stranger on the line can talk it out of it.
    Optional(TlsServer),
    /// A client that does not start TLS learns nothing and gets nothing.
    Required(TlsServer),
}

/// How a handshake ended that broke no rule.
pub(super) enum Handshake {
    /// The client wants the export: requests follow.
    Transmission(Agreement, Channel),
    /// The client only looked.
    Done,
}

/// What both ends agreed on.
pub(super) struct Agreement {
    pub(super) export: Arc<Export>,
    /// Reads are answered by structured replies.
    pub(super) structured: bool,
    /// `BLOCK_STATUS` may be asked.
    pub(super) status: bool,
}

/// What was agreed on so far. TLS starts it anew.
#[derive(Default)]
struct Terms {
    structured: bool,
    /// The export for which `base:allocation` was chosen.
    context: Option<Vec<u8>>,
}

/// What an option led to.
enum Next {
    Option,
    StartTls,
    Transmission(Agreement),
    Done,
}

struct Server<'a> {
    channel: Channel,
    exports: &'a Exports,
    security: &'a NbdSecurity,
    terms: Terms,
    no_zeroes: bool,
}

fn broken(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Shakes hands with a client.
pub(super) fn shake(
    mut channel: Channel,
    exports: &Exports,
    security: &NbdSecurity,
) -> io::Result<Handshake> {
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&GREETING.to_be_bytes());
    greeting[8..16].copy_from_slice(&OPTION.to_be_bytes());
    greeting[16..].copy_from_slice(&(SERVER_FIXED | SERVER_NO_ZEROES).to_be_bytes());
    channel.write_all(&greeting)?;
    let flags = u32::from_be_bytes(channel.read_array()?);
    if flags & CLIENT_FIXED == 0 || flags & !(CLIENT_FIXED | CLIENT_NO_ZEROES) != 0 {
        return Err(broken("the client does not speak fixed newstyle"));
    }
    let mut server = Server {
        channel,
        exports,
        security,
        terms: Terms::default(),
        no_zeroes: flags & CLIENT_NO_ZEROES != 0,
    };
    for _ in 0..MAX_OPTIONS {
        match server.option()? {
            Next::Option => {}
            Next::StartTls => server = server.start_tls()?,
            Next::Transmission(agreement) => {
                return Ok(Handshake::Transmission(agreement, server.channel));
            }
            Next::Done => return Ok(Handshake::Done),
        }
    }
    Err(broken("the client asked for too many options"))
}

impl Server<'_> {
    /// Reads one option and answers it.
    fn option(&mut self) -> io::Result<Next> {
        let header: [u8; OPTION_BYTES] = self.channel.read_array()?;
        let (option, length) =
            decode_option(&header).ok_or_else(|| broken("an option without its magic"))?;
        if length as usize > MAX_OPTION_BYTES {
            if length > MAX_SKIPPED_BYTES || option == OptionKind::ExportName {
                return Err(broken("an option that is far too long"));
            }
            self.channel.skip(u64::from(length))?;
            return self.refuse(option, ERROR_TOO_BIG, "");
        }
        let mut data = vec![0; length as usize];
        self.channel.read_exact(&mut data)?;
        let needs_tls =
            matches!(self.security, NbdSecurity::Required(_)) && !self.channel.is_secure();
        match option {
            OptionKind::Abort => {
                self.answer(option, REPLY_ACK, b"")?;
                Ok(Next::Done)
            }
            OptionKind::StartTls => self.hear_start_tls(&data),
            // This option has no way to say no but to hang up.
            OptionKind::ExportName if needs_tls => Err(broken("the client does without TLS")),
            _ if needs_tls => self.refuse(option, ERROR_TLS_REQUIRED, "this server wants TLS"),
            OptionKind::ExportName => self.export_name(&data),
            OptionKind::List => self.list(&data),
            OptionKind::Info | OptionKind::Go => self.go(option, &data),
            OptionKind::StructuredReply if !data.is_empty() => {
                self.refuse(option, ERROR_INVALID, "STRUCTURED_REPLY takes no data")
            }
            OptionKind::StructuredReply => {
                self.terms.structured = true;
                self.answer(option, REPLY_ACK, b"")?;
                Ok(Next::Option)
            }
            OptionKind::ListMetaContext | OptionKind::SetMetaContext => {
                self.meta_context(option, &data)
            }
            OptionKind::Other(_) => self.refuse(option, ERROR_UNSUPPORTED, ""),
        }
    }

    fn answer(&mut self, option: OptionKind, reply: u32, data: &[u8]) -> io::Result<()> {
        self.channel.write_all(&encode_option_reply(option, reply, data))
    }

    fn refuse(&mut self, option: OptionKind, error: u32, why: &str) -> io::Result<Next> {
        self.answer(option, error, why.as_bytes())?;
        Ok(Next::Option)
    }

    fn find(&self, name: &[u8]) -> Option<Arc<Export>> {
        self.exports.find(name, self.channel.peer_name())
    }

    fn agree(&mut self, export: Arc<Export>, name: &[u8]) -> Agreement {
        let terms = std::mem::take(&mut self.terms);
        // A context that was chosen for another export counts for nothing.
        let status = terms.structured && terms.context.as_deref() == Some(name);
        Agreement { export, structured: terms.structured, status }
    }

    fn flags(&self, export: &Export) -> ExportFlags {
        ExportFlags::ours(export.is_read_only(), self.terms.structured)
    }

    fn hear_start_tls(&mut self, data: &[u8]) -> io::Result<Next> {
        let option = OptionKind::StartTls;
        if !data.is_empty() {
            return self.refuse(option, ERROR_INVALID, "STARTTLS takes no data");
        }
        if self.channel.is_secure() {
            return self.refuse(option, ERROR_INVALID, "TLS is there already");
        }
        if matches!(self.security, NbdSecurity::Plain) {
            return self.refuse(option, ERROR_POLICY, "this server was started without TLS");
        }
        self.answer(option, REPLY_ACK, b"")?;
        Ok(Next::StartTls)
    }

    fn start_tls(self) -> io::Result<Self> {
        let (NbdSecurity::Optional(tls) | NbdSecurity::Required(tls)) = self.security else {
            return Err(broken("TLS was granted and there is none"));
        };
        let channel = self.channel.secure(|socket, limit| tls.accept(socket, limit))?;
        Ok(Self { channel, terms: Terms::default(), ..self })
    }

    fn export_name(&mut self, name: &[u8]) -> io::Result<Next> {
        let export = self
            .find(name)
            .ok_or_else(|| broken("the client asks for an export that is not here"))?;
        let mut reply = Vec::with_capacity(134);
        reply.extend_from_slice(&export.size().to_be_bytes());
        reply.extend_from_slice(&self.flags(&export).0.to_be_bytes());
        if !self.no_zeroes {
            reply.extend_from_slice(&[0; 124]);
        }
        self.channel.write_all(&reply)?;
        Ok(Next::Transmission(self.agree(export, name)))
    }

    fn list(&mut self, data: &[u8]) -> io::Result<Next> {
        let option = OptionKind::List;
        if !data.is_empty() {
            return self.refuse(option, ERROR_INVALID, "LIST takes no data");
        }
        for export in self.exports.all() {
            if export.is_open_to(self.channel.peer_name()) {
                let entry = encode_list_entry(export.name(), export.description());
                self.answer(option, REPLY_SERVER, &entry)?;
            }
        }
        self.answer(option, REPLY_ACK, b"")?;
        Ok(Next::Option)
    }

    fn go(&mut self, option: OptionKind, data: &[u8]) -> io::Result<Next> {
        let Some((name, infos)) = decode_go(data) else {
            return self.refuse(option, ERROR_INVALID, "lengths do not add up");
        };
        let Some(export) = self.find(name) else {
            return self.refuse(option, ERROR_UNKNOWN, "no such export here");
        };
        let info = |data: &[u8]| encode_option_reply(option, REPLY_INFO, data);
        let mut all = info(&encode_info_export(export.size(), self.flags(&export)));
        // Told in any case: a client that does not know it is cut off at its first long request.
        all.extend(info(&encode_info_block_size(MIN_BLOCK, PREFERRED_BLOCK, MAX_PAYLOAD)));
        for wanted in infos {
            let text = match wanted {
                INFO_NAME => export.name(),
                INFO_DESCRIPTION if !export.description().is_empty() => export.description(),
                _ => continue,
            };
            all.extend(info(&encode_info_text(wanted, text)));
            if all.len() > 4 * MAX_TEXT {
                break;
            }
        }
        all.extend(encode_option_reply(option, REPLY_ACK, b""));
        self.channel.write_all(&all)?;
        if option == OptionKind::Info {
            return Ok(Next::Option);
        }
        Ok(Next::Transmission(self.agree(export, name)))
    }

    fn meta_context(&mut self, option: OptionKind, data: &[u8]) -> io::Result<Next> {
        let listing = option == OptionKind::ListMetaContext;
        if !listing {
            // Whatever comes of it, an earlier choice is over.
            self.terms.context = None;
        }
        if !self.terms.structured && !listing {
            return self.refuse(
                option,
                ERROR_INVALID,
                "structured replies must be agreed on first",
            );
        }
        let Some((name, wanted)) = decode_meta_context(data, listing) else {
            return self.refuse(option, ERROR_INVALID, "lengths do not add up");
        };
        if self.find(name).is_none() {
            return self.refuse(option, ERROR_UNKNOWN, "no such export here");
        }
        if wanted {
            if !listing {
                self.terms.context = Some(name.to_vec());
            }
            self.answer(option, REPLY_META_CONTEXT, &encode_context())?;
        }
        self.answer(option, REPLY_ACK, b"")?;
        Ok(Next::Option)
    }
}
