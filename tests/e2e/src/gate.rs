//! A line between two runners (in plaintext) that stops at a chosen frame and says so, so that a test
//! does at exactly that step of the protocol what it wants: kill, stop, cut. It leads any number of
//! sessions, one after another, and can be cut and mended.

use crate::Stage;
use drafter::migrate::{
    link::{CONNECT_LIMIT, Channel, Incoming, Outgoing},
    protocol::Frame,
};
use identity::{Control, HostName, Security, Stream};
use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

/// A step of the protocol: the message whose delivery is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The request.
    Prepare,
    /// The destination is ready.
    Verdict,
    /// The first batch has been sent.
    RoundEnd,
    /// … and is in place.
    RoundApplied,
    /// The machine is about to stand still.
    Expect,
    /// It stands still, and may be run by the destination when this is delivered.
    Token,
    /// The destination owns it.
    Confirmed,
    /// The source's flushes are durable.
    SourceDurable,
    /// Blocks follow, the first of them after the token.
    PostCopy,
    /// All were sent.
    BulkEnd,
    /// All are durable.
    Durable,
}

/// All steps, in their order.
pub const STEPS: [Step; 11] = [
    Step::Prepare,
    Step::Verdict,
    Step::RoundEnd,
    Step::RoundApplied,
    Step::Expect,
    Step::Token,
    Step::Confirmed,
    Step::SourceDurable,
    Step::PostCopy,
    Step::BulkEnd,
    Step::Durable,
];

impl Step {
    fn is(self, frame: &Frame, after_token: bool) -> bool {
        match self {
            Self::Prepare => matches!(frame, Frame::Prepare(_)),
            Self::Verdict => matches!(frame, Frame::Verdict(_)),
            Self::RoundEnd => matches!(frame, Frame::RoundEnd(_)),
            Self::RoundApplied => matches!(frame, Frame::RoundApplied(_)),
            Self::Expect => matches!(frame, Frame::Expect(_)),
            Self::Token => matches!(frame, Frame::Token { .. }),
            Self::Confirmed => matches!(frame, Frame::Confirmed(_)),
            Self::SourceDurable => matches!(frame, Frame::SourceDurable { .. }),
            Self::PostCopy => after_token && matches!(frame, Frame::Blocks { .. }),
            Self::BulkEnd => matches!(frame, Frame::BulkEnd),
            Self::Durable => matches!(frame, Frame::Durable(_)),
        }
    }
}

/// See the module.
pub struct Gate {
    /// Where the source finds it.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct State {
    step: Option<Step>,
    reached: bool,
    open: bool,
    after_token: bool,
    cut: bool,
    ends: Vec<Control>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// Listens on `host` and leads sessions on to `to`; stops at the first `step`.
    #[must_use]
    pub fn at(stage: &Stage, host: usize, to: SocketAddr, step: Step) -> Self {
        let host = stage.fleet.rig().hosts()[host].clone();
        let listener =
            host.namespace.run(|| TcpListener::bind((host.migration, 0))).unwrap().unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            state: Mutex::new(State { step: Some(step), ..State::default() }),
            changed: Condvar::new(),
        });
        let peer = HostName::new(&host.name).unwrap();
        let line = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                let plain = Security::Plaintext;
                let Ok(stream) = Stream::server(socket, &plain, CONNECT_LIMIT) else { continue };
                if line.state.lock().unwrap().cut {
                    stream.control().shutdown();
                    continue;
                }
                let Ok((source, preamble)) = Channel::accept(stream, &plain) else { continue };
                let dial = || Channel::connect(to, &peer, &plain, preamble);
                let Ok(destination) = host.namespace.run(dial).unwrap() else {
                    source.control.shutdown();
                    continue;
                };
                let ends = [source.control.clone(), destination.control.clone()];
                line.state.lock().unwrap().ends.extend(ends.clone());
                lead(source.incoming, destination.outgoing, ends.clone(), Arc::clone(&line));
                lead(destination.incoming, source.outgoing, ends, Arc::clone(&line));
            }
        });
        Self { address, shared }
    }

    /// Waits until the step is reached; false if it does not come in time.
    #[must_use]
    pub fn wait(&self, limit: Duration) -> bool {
        let state = self.shared.state.lock().unwrap();
        let waited = self.shared.changed.wait_timeout_while(state, limit, |s| !s.reached).unwrap();
        waited.0.reached
    }

    /// Delivers what it held, and everything after it.
    pub fn open(&self) {
        self.shared.state.lock().unwrap().open = true;
        self.shared.changed.notify_all();
    }

    /// Ends all connections and takes no new ones. What was held is lost.
    pub fn cut(&self) {
        let mut state = self.shared.state.lock().unwrap();
        state.cut = true;
        state.ends.drain(..).for_each(|end| end.shutdown());
        drop(state);
        self.open();
    }

    /// Takes connections again.
    pub fn mend(&self) {
        self.shared.state.lock().unwrap().cut = false;
    }
}

impl Shared {
    fn pass(&self, frame: &Frame) {
        let mut state = self.state.lock().unwrap();
        state.after_token |= matches!(frame, Frame::Token { .. });
        let after_token = state.after_token;
        if state.reached || !state.step.is_some_and(|step| step.is(frame, after_token)) {
            return;
        }
        state.reached = true;
        self.changed.notify_all();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !state.open && Instant::now() < deadline {
            state = self.changed.wait_timeout(state, Duration::from_secs(1)).unwrap().0;
        }
    }
}

/// Leads frames one way until an end is gone; then the other goes too.
fn lead(mut from: Incoming, mut to: Outgoing, ends: [Control; 2], shared: Arc<Shared>) {
    thread::spawn(move || {
        while let Ok(frame) = from.read() {
            shared.pass(&frame);
            if to.write(&frame).and_then(|()| to.flush()).is_err() {
                break;
            }
        }
        ends.iter().for_each(Control::shutdown);
    });
}
