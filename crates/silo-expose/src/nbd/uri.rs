//! The addresses that libnbd, QEMU and nbdkit understand too (`doc/uri.md` of the NBD project):
//! `nbd://host:port/export`, `nbd+unix:///export?socket=/path`, and with `nbds` the same under TLS.

use super::{Endpoint, NbdError};
use std::{
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
    str::FromStr,
};

/// The port of NBD.
pub const NBD_PORT: u16 = 10809;

/// Whether an address asks for TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// `nbd`
    Plain,
    /// `nbds`
    Tls,
}

/// A server that was not looked up yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// A unix socket.
    Unix(PathBuf),
    /// A host (name or address) and a port.
    Tcp(String, u16),
}

/// Server and export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    /// Whether TLS is asked for.
    pub transport: Transport,
    /// Where.
    pub server: Server,
    /// Which export; "" is the default one.
    pub export: String,
}

impl NbdUri {
    /// The host's name or address, for the server's certificate; none for a unix socket.
    #[must_use]
    pub fn host(&self) -> Option<&str> {
        match &self.server {
            Server::Unix(_) => None,
            Server::Tcp(host, _) => Some(host),
        }
    }

    /// Asks the resolver where the host is.
    ///
    /// # Errors
    /// If it does not know.
    pub fn resolve(&self) -> Result<Endpoint, NbdError> {
        let (host, port) = match &self.server {
            Server::Unix(path) => return Ok(Endpoint::Unix(path.clone())),
            Server::Tcp(host, port) => (host, *port),
        };
        let failed = |source| NbdError::Connect { target: format!("{host}:{port}"), source };
        let mut found = (host.as_str(), port).to_socket_addrs().map_err(failed)?;
        let first: Option<SocketAddr> = found.next();
        first.map(Endpoint::Tcp).ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))
    }
}

impl FromStr for NbdUri {
    type Err = NbdError;

    fn from_str(uri: &str) -> Result<Self, NbdError> {
        let bad = |reason| NbdError::Uri { uri: uri.to_owned(), reason };
        let (scheme, rest) = uri.split_once("://").ok_or_else(|| bad("it has no \"://\""))?;
        let (transport, unix) = match scheme {
            "nbd" => (Transport::Plain, false),
            "nbds" => (Transport::Tls, false),
            "nbd+unix" => (Transport::Plain, true),
            "nbds+unix" => (Transport::Tls, true),
            _ => return Err(bad("it must begin with nbd, nbds, nbd+unix or nbds+unix")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decode(export).ok_or_else(|| bad("the export's %-escapes are wrong"))?;
        if authority.contains('@') {
            // Not repeated: it may hold a password.
            let uri = format!("{scheme}://…");
            return Err(NbdError::Uri { uri, reason: "NBD knows no user and no password" });
        }
        if unix {
            if !authority.is_empty() {
                return Err(bad(
                    "a unix socket has no host: write nbd+unix:///export?socket=/path",
                ));
            }
            let socket = query.split('&').find_map(|part| part.strip_prefix("socket="));
            let path = socket.and_then(decode).filter(|path| !path.is_empty());
            let path = path.ok_or_else(|| bad("it needs ?socket=/path"))?;
            return Ok(Self { transport, server: Server::Unix(path.into()), export });
        }
        // [::1]:10809, host:10809, host
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => {
                let port = port.parse().map_err(|_| bad("the port is not a number"))?;
                (host, port)
            }
            _ => (authority, NBD_PORT),
        };
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(bad("it names no host"));
        }
        Ok(Self { transport, server: Server::Tcp(host.to_owned(), port), export })
    }
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let (high, low) = (digit(rest.next()?)?, digit(rest.next()?)?);
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_other_programs_read_them() {
        let tcp = |host: &str, port| Server::Tcp(host.to_owned(), port);
        let unix = |path: &str| Server::Unix(path.into());
        for (uri, transport, server, export) in [
            ("nbd://example.com", Transport::Plain, tcp("example.com", 10809), ""),
            ("nbd://localhost:1/disk%201", Transport::Plain, tcp("localhost", 1), "disk 1"),
            ("nbds://[::1]/a/b", Transport::Tls, tcp("::1", 10809), "a/b"),
            ("nbds://[::1]:7/", Transport::Tls, tcp("::1", 7), ""),
            ("nbd+unix:///?socket=/run/s", Transport::Plain, unix("/run/s"), ""),
            ("nbds+unix:///x?a=b&socket=%2Frun%2Fs", Transport::Tls, unix("/run/s"), "x"),
        ] {
            let expected = NbdUri { transport, server, export: export.to_owned() };
            assert_eq!(uri.parse::<NbdUri>().unwrap(), expected, "{uri}");
        }
        for bad in [
            "",
            "localhost:10809",
            "http://localhost",
            "nbd://",
            "nbd://:10809",
            "nbd://host:port",
            "nbd+unix:///x",
            "nbd+unix://host/x?socket=/s",
            "nbd://host/%4",
            "nbd://host/%zz",
        ] {
            assert!(matches!(bad.parse::<NbdUri>(), Err(NbdError::Uri { .. })), "{bad}");
        }
        let secret = "nbd://me:hunter2@host/x".parse::<NbdUri>().unwrap_err().to_string();
        assert!(secret.contains("no password") && !secret.contains("hunter2"), "{secret}");
        let here = "nbd://127.0.0.1:9".parse::<NbdUri>().unwrap();
        assert_eq!(here.resolve().unwrap(), Endpoint::Tcp(([127, 0, 0, 1], 9).into()));
    }
}
