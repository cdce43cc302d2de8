//! Opens the link of a session, and opens it again after a cut, for as long as the session lives.

use super::Shared;
use crate::{
    lane::{Lane, Track, Work, lock},
    peer::{Hangup, Incoming, Link, PeerError},
    report::Phase,
    wire::{self, WireError},
};
use silo_block::{
    order::Class,
    session::{
        LinkId,
        messages::{Reason, ToSource},
        source::Event,
    },
};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Between two tries: at first, and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

impl Shared {
    pub(super) fn keep_linked(self: &Arc<Self>) {
        let (first, mut pause) = (self.first_link, PAUSES.0);
        let mut number = first;
        while self.lanes.wait_for_none() {
            if number > first {
                if self.lanes.has_heard(LinkId(number)) {
                    pause = PAUSES.0;
                } else {
                    // There was none, or one that was hung up without a word.
                    self.lanes.rest(pause);
                    pause = (pause * 2).min(PAUSES.1);
                }
            }
            number += 1;
            match self.dial.link(self.session, number) {
                Ok(link) => self.install(link),
                Err(error) => {
                    tracing::debug!(session = %self.session, %error, "no link");
                    self.lanes.note_trouble(error.to_string());
                    // What is wrong with who they are does not get better; a cut does.
                    if number == first + 1 && is_final(&error) {
                        self.tell(Event::Cancel(format!("no connection: {error}")));
                    }
                }
            }
        }
    }

    /// Puts a link to use.
    fn install(self: &Arc<Self>, link: Link) {
        let id = LinkId(link.attempt);
        let work = Arc::new(Work::default());
        let hangup = link.hangup();
        let control = link.control.outgoing;
        if !self.lanes.put(Lane::new(id, control, hangup.clone(), work.clone())) {
            return;
        }
        let mut started = vec![{
            let (incoming, ended) = (link.control.incoming, hangup.clone());
            let urged = work.clone();
            self.spawn("silo-control", move |shared| shared.listen(id, incoming, &ended, &urged))
        }];
        let connections = link.data.into_iter().map(|connection| (Track::Bulk, connection));
        for (track, connection) in connections.chain([(Track::Demand, link.demand)]) {
            let work = work.clone();
            started.push(self.spawn("silo-send", move |shared| {
                shared.send_blocks(id, track, connection.outgoing, &work);
            }));
        }
        if let Some(error) = started.into_iter().find_map(Result::err) {
            self.hang_up(id, Some(format!("no thread for a connection: {error}")));
            return;
        }
        self.tell(Event::Connected(id));
    }

    /// Reads the control connection of one link.
    fn listen(&self, id: LinkId, mut incoming: Incoming, ended: &Hangup, work: &Work) {
        let (mut counted, mut heard) = (0, false);
        let trouble = loop {
            let message = match incoming.read() {
                Ok(frame) => wire::read_to_source(&frame),
                Err(error) => break error,
            };
            let received = incoming.received();
            self.lanes.wire.control_received.fetch_add(received - counted, Ordering::Relaxed);
            counted = received;
            self.lanes.note_heard(id);
            match message {
                Ok(Some(message)) => {
                    if !heard && matches!(message, ToSource::Have { .. }) {
                        heard = true;
                        self.clock.enter(Phase::Filling);
                    }
                    if let ToSource::Receipt { device, range, epoch, retry } = &message
                        && let Some(versions) = self.versions.get(usize::from(device.0))
                    {
                        versions.acknowledge(*range, *epoch);
                        for range in retry {
                            versions.forget(*range);
                            lock(&self.refused[usize::from(device.0)]).insert_range(*range);
                        }
                    }
                    let urgent = match &message {
                        ToSource::Need { device, range, class: Class::Demand } => {
                            Some((*device, *range))
                        }
                        _ => None,
                    };
                    self.tell(Event::Received(id, message));
                    if let Some((device, range)) = urgent {
                        work.urge(device, range);
                    }
                }
                Ok(None) => {}
                Err(error) => break error,
            }
        };
        if !matches!(trouble, WireError::Io(_)) {
            self.tell(Event::Unable(Reason::Protocol(trouble.to_string())));
        }
        self.hang_up(id, Some(format!("the control connection: {trouble}")));
        // Whoever ends the session waits for this.
        ended.hang_up();
    }
}

/// Whether trying again is in vain.
fn is_final(error: &PeerError) -> bool {
    use identity::Error;
    match error {
        PeerError::Identity(error) => !matches!(
            error,
            Error::Connect { .. } | Error::Socket { .. } | Error::HandshakeTimeout { .. }
        ),
        PeerError::Wire { source, .. } => !matches!(source, WireError::Io(_)),
        PeerError::NotAllowed { .. } => true,
        PeerError::Nobody(_) | PeerError::Here { .. } => false,
    }
}
