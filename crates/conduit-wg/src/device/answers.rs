//! What a tunnel answers: questions of its control socket, a hand-over to a new process among them.
//! Called by the tunnel's thread between packets.

use super::{End, Job, Phase, Tunnel};
use crate::{
    TunnelError,
    control::{self, Answer, Ask, Handed, Kept, PeerStatus, Question, Reply, Status},
    handover::{Departure, Pipe, Word},
    peers,
    state::KnownPeer,
};
use std::{
    os::fd::AsFd,
    sync::mpsc,
    time::{Duration, Instant, SystemTime},
};

/// How long a hand-over waits for the peers to be on disk; packets wait as long.
const WRITE_LIMIT: Duration = Duration::from_secs(2);

impl Tunnel {
    /// Questions, and words of a new process.
    pub(super) fn hear(&mut self, now: Instant) -> Result<Option<End>, TunnelError> {
        if let Phase::Leaving(departure) = &mut self.phase
            && departure.quiet_since.is_none()
        {
            match departure.hear() {
                Word::Nothing => {}
                Word::Take => {
                    self.engine.wire.send();
                    departure.give(now);
                    tracing::info!("the tunnel is another process's; this one ends soon");
                }
                Word::Gone => {
                    tracing::warn!("the process that was to take the tunnel is gone; going on");
                    let _ = departure.outcome.send(Kept);
                    self.phase = Phase::Alone;
                    self.engine.renew_all();
                }
            }
        }
        while let Ok(question) = self.questions.try_recv() {
            if let Some(end) = self.answer(question, now)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn answer(&mut self, question: Question, now: Instant) -> Result<Option<End>, TunnelError> {
        let Question { ask, from, reply } = question;
        let settled = matches!(self.phase, Phase::Alone | Phase::Arrived(_));
        let answer = match ask {
            Ask::Status => Answer::Status(Box::new(self.status())),
            Ask::Stop { remove } => {
                // Said here: the thread that says it otherwise ends with the process.
                let _ = control::say(&from, &Answer::Done);
                return Ok(Some(if remove { End::Removed } else { End::Stopped }));
            }
            _ if !settled => Answer::Failed("it is being handed over; ask again soon".into()),
            Ask::Peers { peers } => match self.set_peers(peers, now) {
                Ok(()) => {
                    // Answered once it is written down.
                    let known = self.engine.peers.known();
                    let _ = self.jobs.send(Job::Peers(known, Some(reply)));
                    return Ok(None);
                }
                Err(e) => Answer::Failed(e.to_string()),
            },
            Ask::Rotate if self.keys.next.is_some() => {
                Answer::Failed("the keys are being changed already".into())
            }
            Ask::Rotate => match self.rotate(now) {
                Ok(()) => Answer::Done,
                Err(e) => Answer::Failed(e.to_string()),
            },
            Ask::Upgrade { version: control::VERSION } => match self.hand_over(&from) {
                Ok(outcome) => {
                    let _ = reply.send(Reply::Handing(outcome));
                    return Ok(None);
                }
                Err(e) => Answer::Failed(e.to_string()),
            },
            Ask::Upgrade { version } => Answer::Failed(format!(
                "this tunnel hands over by version {}, not {version}; stop it instead",
                control::VERSION
            )),
        };
        let _ = reply.send(Reply::Say(answer));
        Ok(None)
    }

    fn set_peers(
        &mut self,
        configs: Vec<crate::PeerConfig>,
        now: Instant,
    ) -> Result<(), TunnelError> {
        peers::check(&configs)?;
        let known = configs.into_iter().map(|config| KnownPeer { config, heard_from: None });
        self.engine.set_peers(known.collect())?;
        self.engine.seek_all(now);
        Ok(())
    }

    /// Gives everything to the process at the other end of `new`.
    fn hand_over(
        &mut self,
        new: &std::os::unix::net::UnixStream,
    ) -> Result<mpsc::Receiver<Kept>, TunnelError> {
        let fail = || TunnelError::system("hand the tunnel over");
        // After all that is still to be written.
        let (done, written) = mpsc::sync_channel(1);
        let _ = self.jobs.send(Job::Peers(self.engine.peers.known(), Some(done)));
        if !matches!(written.recv_timeout(WRITE_LIMIT), Ok(Reply::Say(Answer::Done))) {
            let why = "the peers could not be written down in time; look at the disk of the state \
                       folder and try again. This process goes on";
            return Err(TunnelError::invalid("hand the tunnel over", why));
        }
        let peers = &self.engine.peers;
        let live = |id| peers.peer(id).filter(|p| p.best.is_some()).map(|p| p.config.name.clone());
        let handed = Handed {
            interface: self.tun.name().to_owned(),
            mtu: self.mtu,
            live: peers.ids().into_iter().filter_map(live).collect(),
        };
        let (pipe, its_end) = Pipe::pair().map_err(fail())?;
        let descriptors = [
            self.tun.as_fd(),
            self.engine.wire.outer.as_fd(),
            self.listener.as_fd(),
            its_end.as_fd(),
        ];
        control::hand(new, handed, &descriptors).map_err(fail())?;
        let (outcome, kept) = mpsc::sync_channel(1);
        let connection = new.try_clone().map_err(fail())?;
        let departure = Departure::new(connection, pipe, outcome).map_err(fail())?;
        self.phase = Phase::Leaving(departure);
        Ok(kept)
    }

    fn status(&mut self) -> Status {
        let mut list = Vec::new();
        let peers = &mut self.engine.peers;
        for id in peers.ids() {
            let Some(peer) = peers.peer(id) else { continue };
            let mut status = PeerStatus {
                config: peer.config.clone(),
                at: peer.endpoint,
                handshake: None,
                key: None,
                own: None,
                path: peer.path,
            };
            if let Some(link) = peer.best.and_then(|best| peers.link_mut(best)) {
                status.handshake = link.tunn.time_since_last_handshake().map(|t| t.as_secs());
                status.key = Some(link.theirs);
                status.own = Some(link.own);
            }
            list.push(status);
        }
        let listen = self.engine.wire.outer.address().unwrap_or(self.settings.listen);
        Status {
            interface: self.tun.name().to_owned(),
            mtu: self.mtu,
            listen,
            process: std::process::id(),
            keys: self.keys.all().map(crate::PrivateKey::public).collect(),
            key_age: self.keys.age(SystemTime::now()).as_secs(),
            peers: list,
            counts: self.engine.wire.counters.by_name(),
        }
    }
}
