//! Where a source that connects again comes in, and what is known of its connection meanwhile.
//!
//! The runner's listener knocks with new connections; the session's thread, which has lost the old
//! ones (or loses them because of the knock), takes them in. The door outlives the session, to tell a
//! source that asks how it ended.

use crate::migrate::{
    again::Greeter,
    link::Channel,
    messages::{ResumeAnswer, ResumeRequest, Standing},
    protocol::Frame,
};
use identity::{Control, HostName};
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// A source that says nothing for so long is reported as silent: it pings four times a second.
const SILENCE: Duration = Duration::from_secs(2);

/// New connections of a source that may come in.
pub(super) struct Visitor {
    pub(super) main: Channel,
    pub(super) fault: Channel,
}

/// See the module.
pub struct Door {
    place: Mutex<Place>,
    changed: Condvar,
}

struct Place {
    greeter: Greeter,
    visitor: Option<Visitor>,
    /// The open connections.
    line: Vec<Control>,
    heard: Instant,
    /// Since when there is none, and why.
    lost: Option<(Instant, String)>,
    /// How the session ended.
    over: Option<ResumeAnswer>,
    closed: bool,
}

impl Door {
    /// A door for the source that `greeter` knows.
    #[must_use]
    pub fn new(greeter: Greeter) -> Arc<Self> {
        Arc::new(Self {
            place: Mutex::new(Place {
                greeter,
                visitor: None,
                line: Vec::new(),
                heard: Instant::now(),
                lost: None,
                over: None,
                closed: false,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is the move that a greeting names.
    #[must_use]
    pub fn knows(&self, request: &ResumeRequest) -> bool {
        self.lock().greeter.knows(request)
    }

    /// A source has connected again, with this greeting. Answers it if the session has ended or it is a
    /// stranger; else its connections take the place of the old ones.
    pub fn knock(
        &self,
        request: &ResumeRequest,
        proved: Option<&HostName>,
        main: Channel,
        fault: Channel,
    ) {
        let mut place = self.lock();
        if let Err(stranger) = place.greeter.check(request, proved) {
            drop(place);
            tracing::warn!(%stranger, "a source was turned away");
            return turn_away(main, &ResumeAnswer::of(Standing::Unknown, stranger.to_string()));
        }
        if let Some(answer) = place.over.clone() {
            drop(place);
            return turn_away(main, &answer);
        }
        // It has given the old ones up.
        place.line.iter().for_each(Control::shutdown);
        place.visitor = Some(Visitor { main, fault });
        drop(place);
        self.changed.notify_all();
    }

    /// The next visitor, if one comes in time.
    pub(super) fn wait(&self, limit: Duration) -> Option<Visitor> {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |place| {
            place.visitor.is_none() && !place.closed
        });
        waited.unwrap_or_else(PoisonError::into_inner).0.visitor.take()
    }

    /// These connections are the session's now. False if somebody knocks already, who has better ones.
    pub(super) fn opened(&self, line: &[Control; 2]) -> bool {
        let mut place = self.lock();
        if place.visitor.is_some() {
            return false;
        }
        place.line = line.to_vec();
        place.heard = Instant::now();
        place.lost = None;
        true
    }

    /// Something came from the source.
    pub(super) fn heard(&self) {
        self.lock().heard = Instant::now();
    }

    /// Ends the open connections, because something is wrong with them.
    pub(super) fn break_line(&self) {
        self.lock().line.iter().for_each(Control::shutdown);
    }

    /// The connections are gone.
    pub(super) fn lost(&self, why: &str) {
        let mut place = self.lock();
        place.line.drain(..).for_each(|control| control.shutdown());
        if place.lost.is_none() {
            place.lost = Some((Instant::now(), why.to_owned()));
        }
    }

    /// The session has ended: what a source is told that asks later. One that waits is told now.
    pub fn end(&self, answer: &ResumeAnswer) {
        let visitor = {
            let mut place = self.lock();
            place.over = Some(answer.clone());
            place.lost = None;
            place.visitor.take()
        };
        if let Some(visitor) = visitor {
            turn_away(visitor.main, answer);
        }
    }

    /// Nobody will take visitors in any more.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// For how long the source has not been heard, and why; `None` while all is well, or over.
    #[must_use]
    pub fn outage(&self) -> Option<(Duration, String)> {
        let place = self.lock();
        if place.over.is_some() {
            return None;
        }
        match &place.lost {
            Some((since, why)) => Some((since.elapsed(), why.clone())),
            None if place.heard.elapsed() > SILENCE && !place.line.is_empty() => {
                Some((place.heard.elapsed(), "it says nothing".to_owned()))
            }
            None => None,
        }
    }
}

/// Answers and closes.
pub(crate) fn turn_away(mut main: Channel, answer: &ResumeAnswer) {
    let json = serde_json::to_vec(answer).unwrap_or_default();
    let sent = main.outgoing.write(&Frame::Resumed(json)).and_then(|()| main.outgoing.flush());
    if sent.is_ok() {
        // What is closed with unread bytes is reset, and the answer may be lost with it.
        main.control.set_read_timeout(Some(SILENCE));
        let _ = main.incoming.read();
    }
    main.control.shutdown();
}
