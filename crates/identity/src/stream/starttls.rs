//! TLS that begins in the middle of another protocol: after NBD's `STARTTLS`, say. There is no
//! greeting, because the other end may be any program that speaks TLS 1.3.
//!
//! The certificates are either those of an [`Identity`], or the PEM files that QEMU, nbdkit and
//! libnbd use: a folder with `ca-cert.pem`, and `server-cert.pem` and `server-key.pem` for a
//! server, `client-cert.pem` and `client-key.pem` for a client that has to prove who it is.
//!
//! What must hold: the caller has read nothing beyond the message that starts TLS; what it read
//! before counts for nothing afterwards (a stranger on the line may have written it).
//!
//! In TLS 1.3 a client is done before the server has looked at its certificate. A refusal comes
//! with the first read.

use super::{
    Secure, Spill, Stream, describe,
    engine::{Connection, Engine},
    handshake::{Attempt, Deadline, finish},
};
use crate::{Error, HostName, Identity, Result, tls};
use nix::sys::socket::{setsockopt, sockopt::TcpNoDelay};
use rustls::{
    ClientConfig, ServerConfig, client::UnbufferedClientConnection, pki_types::ServerName,
    server::UnbufferedServerConnection,
};
use std::{
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// Whether a server wants to know who its clients are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerCheck {
    /// A client without a certificate of our authority is refused.
    Required,
    /// Clients are not asked: the line is protected, and anybody who reaches it may come.
    Off,
}

/// The server's end of TLS inside another protocol. Cheap to clone.
#[derive(Clone)]
pub struct TlsServer {
    config: Server,
    authority: PathBuf,
    /// The client must prove a host name, and the stream tells it.
    names: bool,
}

/// The client's end of TLS inside another protocol. Cheap to clone.
#[derive(Clone)]
pub struct TlsClient {
    config: Client,
    authority: PathBuf,
    server: ServerName<'static>,
    peer: Option<HostName>,
}

/// Settings of a server: read once, or as an identity's files are when they are needed.
#[derive(Clone)]
enum Server {
    Fixed(Arc<ServerConfig>),
    Of(Identity),
}

/// The same of a client.
#[derive(Clone)]
enum Client {
    Fixed(Arc<ClientConfig>),
    Of(Identity),
}

impl Server {
    fn now(&self) -> Arc<ServerConfig> {
        match self {
            Self::Fixed(config) => config.clone(),
            Self::Of(identity) => identity.server(),
        }
    }
}

impl Client {
    fn now(&self) -> Arc<ClientConfig> {
        match self {
            Self::Fixed(config) => config.clone(),
            Self::Of(identity) => identity.client(),
        }
    }
}

impl std::fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TlsServer({})", self.authority.display())
    }
}

impl std::fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TlsClient({:?})", self.server)
    }
}

impl TlsServer {
    /// Clients must be hosts of the same authority; [`Stream::peer_name`] says which.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        Self {
            config: Server::Of(identity.clone()),
            authority: identity.authority().into(),
            names: true,
        }
    }

    /// Reads `server-cert.pem` and `server-key.pem` from `dir`, and `ca-cert.pem` where clients
    /// are checked. Names in clients' certificates are not looked at.
    ///
    /// # Errors
    /// Says which file is missing or damaged.
    pub fn load_pem(dir: &Path, clients: PeerCheck) -> Result<Self> {
        let config = Arc::new(tls::pem_server(dir, clients == PeerCheck::Required)?);
        Ok(Self {
            config: Server::Fixed(config),
            authority: dir.join(tls::PEM_AUTHORITY),
            names: false,
        })
    }

    /// Shakes hands with the client on `socket` within `limit`.
    ///
    /// # Errors
    /// No handshake in time, or a client without the certificate that it needs.
    pub fn accept(&self, socket: impl Into<OwnedFd>, limit: Duration) -> Result<Stream> {
        let (socket, address) = look(socket.into());
        let attempt = Attempt {
            socket: &socket,
            who: describe(address, None),
            deadline: Deadline::new(limit),
            authority: &self.authority,
        };
        let connection = UnbufferedServerConnection::new(self.config.now())
            .map_err(|e| attempt.translate(&e))?;
        let secure = Secure::new(Engine::new(Connection::Server(Box::new(connection))));
        let mut spill = Spill::default();
        attempt.shake_hands(&secure, &mut spill)?;
        let mut name = None;
        if self.names {
            let engine = secure.engine();
            let certificate = engine.peer_certificate().ok_or_else(|| Error::BadCertificate {
                who: attempt.who.clone(),
                detail: "it sent none; both sides must have one".to_owned(),
            })?;
            name = Some(tls::peer_name(certificate, &attempt.who)?);
        }
        Ok(finish(socket, address, name, Some(secure), spill))
    }
}

impl TlsClient {
    /// The server must prove that it is the host `peer`, and learns who we are.
    #[must_use]
    pub fn new(identity: &Identity, peer: &HostName) -> Self {
        Self {
            config: Client::Of(identity.clone()),
            authority: identity.authority().into(),
            server: tls::server_name(peer),
            peer: Some(peer.clone()),
        }
    }

    /// Reads `ca-cert.pem` from `dir`, and `client-cert.pem` and `client-key.pem` if they are
    /// there. `server` is the host name or address that the server's certificate must carry.
    ///
    /// # Errors
    /// Says which file is missing or damaged, or that `server` cannot be a name.
    pub fn load_pem(dir: &Path, server: &str) -> Result<Self> {
        let name = ServerName::try_from(server.to_owned()).map_err(|_| Error::BadName {
            name: server.to_owned(),
            rule: "a server's certificate is for a host name or an address",
        })?;
        let config = Client::Fixed(Arc::new(tls::pem_client(dir)?));
        let authority = dir.join(tls::PEM_AUTHORITY);
        Ok(Self { config, authority, server: name, peer: None })
    }

    /// Shakes hands with the server on `socket` within `limit`.
    ///
    /// # Errors
    /// No handshake in time, or a server that is not who it should be.
    pub fn connect(&self, socket: impl Into<OwnedFd>, limit: Duration) -> Result<Stream> {
        let (socket, address) = look(socket.into());
        let attempt = Attempt {
            socket: &socket,
            who: describe(address, self.peer.as_ref()),
            deadline: Deadline::new(limit),
            authority: &self.authority,
        };
        let connection = UnbufferedClientConnection::new(self.config.now(), self.server.clone())
            .map_err(|e| attempt.translate(&e))?;
        let secure = Secure::new(Engine::new(Connection::Client(Box::new(connection))));
        let mut spill = Spill::default();
        attempt.shake_hands(&secure, &mut spill)?;
        Ok(finish(socket, address, self.peer.clone(), Some(secure), spill))
    }
}

/// The address of a TCP connection, whose small messages are not kept back; a unix socket has
/// neither.
fn look(socket: OwnedFd) -> (OwnedFd, Option<SocketAddr>) {
    let tcp = TcpStream::from(socket);
    let address = tcp.peer_addr().ok();
    let socket = OwnedFd::from(tcp);
    if address.is_some() {
        // Without it the connection is slower, and works.
        let _ = setsockopt(&socket, TcpNoDelay, &true);
    }
    (socket, address)
}
