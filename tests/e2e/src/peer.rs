//! Scripted peers: they speak the migration protocol with real certificates over real links, and
//! do at each step what a test wants, so that failures come at exactly the moment that is meant.

use crate::Stage;
use drafter::migrate::{
    link::{self, CONNECT_LIMIT, Channel},
    messages::{PrepareRequest, TokenMeta, Verdict},
    protocol::{Frame, Role, SessionId},
};
use identity::{HostName, Identity, Security, Stream};
use std::{
    net::{SocketAddr, TcpListener},
    time::Duration,
};

/// How long the other end may keep a script waiting.
const PATIENCE: Duration = Duration::from_secs(20);

fn security(stage: &Stage, host: usize) -> Security {
    let rig = stage.fleet.rig();
    let name = HostName::new(&rig.hosts()[host].name).unwrap();
    match rig.identity() {
        Some(folder) => Security::Mutual(Identity::load(&folder, &name).unwrap()),
        None => Security::Plaintext,
    }
}

/// A destination on host b that does what the test says.
pub struct ScriptedDestination {
    listener: TcpListener,
    security: Security,
    host: String,
    /// Where it listens.
    pub address: SocketAddr,
}

/// A source that has connected to a [`ScriptedDestination`].
pub struct Visit {
    /// Control and bulk.
    pub main: Channel,
    /// Demands.
    pub fault: Channel,
    /// What the source asked.
    pub request: PrepareRequest,
    host: String,
}

impl ScriptedDestination {
    /// Listens on host b.
    #[must_use]
    pub fn listen(stage: &Stage) -> Self {
        let host = &stage.fleet.rig().hosts()[1];
        let bound = host.namespace.run(|| TcpListener::bind((host.migration, 7400)));
        let listener = bound.unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        Self { listener, security: security(stage, 1), host: host.name.clone(), address }
    }

    fn channel(&self) -> (Role, Channel) {
        let (socket, _) = self.listener.accept().unwrap();
        let stream = Stream::server(socket, &self.security, CONNECT_LIMIT).unwrap();
        let (channel, preamble) = Channel::accept(stream, &self.security).unwrap();
        channel.control.set_read_timeout(Some(PATIENCE));
        (preamble.role, channel)
    }

    /// Takes a source's two connections and its request.
    #[must_use]
    pub fn accept(&self) -> Visit {
        // A source opens them side by side.
        let (mut main, fault) = match (self.channel(), self.channel()) {
            ((Role::Main, main), (Role::Fault, fault))
            | ((Role::Fault, fault), (Role::Main, main)) => (main, fault),
            ((one, _), (other, _)) => panic!("a source opened {one:?} and {other:?}"),
        };
        let Frame::Prepare(json) = main.incoming.read().unwrap() else {
            panic!("a source begins with its request")
        };
        let request = serde_json::from_slice(&json).unwrap();
        Visit { main, fault, request, host: self.host.clone() }
    }
}

impl Visit {
    /// Sends a frame.
    pub fn send(&mut self, frame: &Frame) {
        self.main.outgoing.write(frame).unwrap();
        self.main.outgoing.flush().unwrap();
    }

    /// "Everything is ready here", on another boot.
    pub fn ready(&mut self) {
        let verdict = Verdict { host: self.host.clone(), ..Verdict::default() };
        self.send(&Frame::Verdict(serde_json::to_vec(&verdict).unwrap()));
    }

    /// An offer that holds for two seconds.
    pub fn offer(&mut self, serial: u64) {
        let attempt = self.request.attempt;
        self.send(&Frame::Offer { attempt, serial, good_for_ms: 2000 });
    }

    /// The next frame that is not a ping (answered), not a block and no word about the blackout
    /// (dropped).
    pub fn next_frame(&mut self) -> Frame {
        loop {
            match self.main.incoming.read().unwrap() {
                Frame::Ping(nonce) => self.send(&Frame::Pong(nonce)),
                Frame::Blocks { .. }
                | Frame::Zero { .. }
                | Frame::Missing { .. }
                | Frame::Expect(_) => {}
                other => return other,
            }
        }
    }

    /// As [`Visit::next`], for a source that is expected to go: `None` when it has.
    pub fn next_or_end(&mut self) -> Option<Frame> {
        loop {
            match self.main.incoming.read() {
                Ok(Frame::Ping(nonce)) => self.send(&Frame::Pong(nonce)),
                Ok(
                    Frame::Blocks { .. }
                    | Frame::Zero { .. }
                    | Frame::Missing { .. }
                    | Frame::Expect(_),
                ) => {}
                Ok(other) => return Some(other),
                Err(_) => return None,
            }
        }
    }

    /// Is a good destination until the token has come: rounds applied, offers renewed.
    pub fn until_token(&mut self) -> TokenMeta {
        let mut serial = 1;
        self.offer(serial);
        loop {
            match self.next_frame() {
                Frame::RoundEnd(round) => {
                    serial += 1;
                    self.offer(serial);
                    self.send(&Frame::RoundApplied(round));
                }
                Frame::Token { meta, .. } => return serde_json::from_slice(&meta).unwrap(),
                other => panic!("no token but {other:?}"),
            }
        }
    }
}

/// A source on host a that does what the test says.
pub struct ScriptedSource {
    /// Control and bulk.
    pub main: Channel,
    /// Demands.
    pub fault: Channel,
}

impl ScriptedSource {
    /// Opens a session with the runner at `to`, on host b.
    #[must_use]
    pub fn connect(stage: &Stage, to: SocketAddr) -> Self {
        let hosts = stage.fleet.rig().hosts();
        let (security, peer) = (security(stage, 0), HostName::new(&hosts[1].name).unwrap());
        let session: SessionId = link::new_session().unwrap();
        let open = |role| {
            let preamble = link::preamble(role, session);
            let opened =
                hosts[0].namespace.run(|| Channel::connect(to, &peer, &security, preamble));
            let channel = opened.unwrap().unwrap();
            channel.control.set_read_timeout(Some(PATIENCE));
            channel
        };
        Self { main: open(Role::Main), fault: open(Role::Fault) }
    }

    /// Sends a request as it is and returns the verdict.
    pub fn ask_raw(&mut self, request: Vec<u8>) -> Verdict {
        self.main.outgoing.write(&Frame::Prepare(request)).unwrap();
        self.main.outgoing.flush().unwrap();
        let Frame::Verdict(json) = self.main.incoming.read().unwrap() else {
            panic!("a destination answers a request with its verdict")
        };
        serde_json::from_slice(&json).unwrap()
    }

    /// Sends a request and returns the verdict.
    pub fn ask(&mut self, request: &PrepareRequest) -> Verdict {
        self.ask_raw(serde_json::to_vec(request).unwrap())
    }
}
