//! The API's socket: one thread per connection, one request after another on each.

use super::{
    Runner,
    api::{self, OutputStream, Reply, Request},
    fork::Image,
};
use drafter_guest::protocol::{ExecRequest, ExitStatus, Stream};
use std::{
    io::BufReader,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// How often a follower hears how far a job is.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(100);

/// Removes its socket when dropped.
pub(super) struct ApiSocket(PathBuf);

impl Drop for ApiSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Answers on the machine's API socket, on threads of its own.
pub(super) fn listen(runner: &Arc<Runner>) -> Result<ApiSocket, String> {
    let path = runner.dir.socket();
    // No runner lives (checked before), so a socket that is there is a leftover.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    let runner = Arc::clone(runner);
    std::thread::Builder::new()
        .name("api".into())
        .spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                let runner = Arc::clone(&runner);
                let served = std::thread::Builder::new()
                    .name("api-client".into())
                    .spawn(move || serve(&runner, stream));
                if let Err(error) = served {
                    tracing::error!(%error, "no thread for an API client");
                }
            }
        })
        .map_err(|e| e.to_string())?;
    Ok(ApiSocket(path))
}

fn serve(runner: &Arc<Runner>, stream: UnixStream) {
    let mut reader = BufReader::new(stream);
    // What the last request made, if it made an image.
    let mut image: Option<Image> = None;
    loop {
        let line = match api::read_line(&mut reader) {
            Ok(Some(line)) => line,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "an API client was dropped");
                return;
            }
        };
        let out = reader.get_mut();
        let _answering = Answering::begin(runner);
        let answer = match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                // Of a request before; before another is made.
                drop(image.take());
                match request {
                    Request::Fork => runner.fork().and_then(|(report, made)| {
                        image = Some(made);
                        json(report)
                    }),
                    request => answer(runner, request, out),
                }
            }
            Err(error) => Err(format!("the request cannot be read: {error}")),
        };
        let reply = match answer {
            Ok(value) => Reply::Done { value },
            Err(message) => Reply::Failed { message },
        };
        if api::send_line(out, &reply).is_err() {
            return;
        }
    }
}

/// Counts a request until its answer is written.
struct Answering<'a>(&'a Runner);

impl<'a> Answering<'a> {
    fn begin(runner: &'a Runner) -> Self {
        runner.answering.fetch_add(1, Ordering::AcqRel);
        Self(runner)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.answering.fetch_sub(1, Ordering::AcqRel);
    }
}

fn json(value: impl serde::Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(value).map_err(|e| e.to_string())
}

fn answer(
    runner: &Arc<Runner>,
    request: Request,
    out: &mut UnixStream,
) -> Result<serde_json::Value, String> {
    match request {
        Request::Status => json(runner.status()),
        Request::Inspect => runner.inspect(),
        Request::Exec { argv, env, timeout_s } => {
            let mut exec = ExecRequest::new(argv, Duration::from_secs(timeout_s));
            exec.env = env;
            runner.exec(&exec, out)
        }
        Request::WaitReady { timeout_s } => {
            runner.wait_ready(Duration::from_secs(timeout_s))?;
            Ok(serde_json::Value::Null)
        }
        Request::AskHost { to, peer } => json(runner.ask_host(to, &peer)?),
        Request::Migrate(request) => json(runner.migrate(request)?),
        Request::Follow { job } => runner.follow(job, out),
        Request::Cancel { job } => {
            runner.job(job)?.cancel();
            json(format!(
                "job {job} ends as soon as it can; it goes on if the machine has been handed over"
            ))
        }
        Request::Suspend { directory } => runner.suspend(&directory),
        Request::SuspendToStore(request) => json(runner.suspend_to_store(&request)?),
        Request::Backup(request) => json(runner.backup(&request)?),
        Request::EndBackup => json(runner.end_backup()?),
        Request::Protect(request) => json(runner.protect(&request)?),
        Request::EndProtect => json(runner.end_protect()?),
        Request::Stop { grace_s } => json(runner.stop(Duration::from_secs(grace_s))?),
        // Whoever has the connection keeps the image.
        Request::Fork => Err("an image is made by the connection that asks for it".into()),
        Request::DropStay => json(runner.drop_stay()),
        Request::Load { sample_ms, compare } => {
            json(runner.load(Duration::from_millis(sample_ms), &compare)?)
        }
    }
}

impl Runner {
    fn job(&self, number: u64) -> Result<Arc<super::Job>, String> {
        let job = self.lock().jobs.get(&number).cloned();
        job.ok_or_else(|| format!("there is no job {number}"))
    }

    fn follow(&self, number: u64, out: &mut UnixStream) -> Result<serde_json::Value, String> {
        let job = self.job(number)?;
        loop {
            if let Some(result) = job.wait(FOLLOW_INTERVAL) {
                return result;
            }
            // A follower that went away harms no job.
            api::send_line(out, &Reply::Progress(job.progress())).map_err(|e| e.to_string())?;
        }
    }

    fn guest(&self) -> Result<Arc<crate::guest::GuestChannel>, String> {
        let guest = self.lock().guest.clone();
        guest.ok_or_else(|| "the machine does not run here".to_owned())
    }

    fn wait_ready(&self, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        let guest = loop {
            if let Ok(guest) = self.guest() {
                break guest;
            }
            let inner = self.lock();
            if inner.state.over() || Instant::now() > deadline {
                return Err(format!("the machine is {}: {}", inner.state.word(), inner.detail));
            }
            drop(self.changed.wait_timeout(inner, Duration::from_millis(50)));
        };
        guest
            .wait_ready(deadline.saturating_duration_since(Instant::now()))
            .map_err(|e| e.to_string())
    }

    fn exec(
        &self,
        request: &ExecRequest,
        out: &mut UnixStream,
    ) -> Result<serde_json::Value, String> {
        let guest = self.guest()?;
        let status = guest
            .exec(request, |output| {
                let stream = match output.stream {
                    Stream::Stdout => OutputStream::Stdout,
                    Stream::Stderr => OutputStream::Stderr,
                };
                let text = String::from_utf8_lossy(&output.data).into_owned();
                // A client that went away does not end the command; its time limit does.
                let _ = api::send_line(out, &Reply::Output { stream, text });
            })
            .map_err(|e| e.to_string())?;
        json(match status {
            ExitStatus::Code(code) => serde_json::json!({ "exit_code": code }),
            ExitStatus::Signal(signal) => serde_json::json!({ "signal": signal }),
            ExitStatus::TimedOut => serde_json::json!({ "ended": "timed out" }),
            ExitStatus::Cancelled => serde_json::json!({ "ended": "cancelled" }),
        })
    }

    fn inspect(&self) -> Result<serde_json::Value, String> {
        let status = json(self.status())?;
        let facts = self.driver.facts().map_err(|e| e.to_string())?;
        let inner = self.lock();
        let body = inner.body.as_ref().map(|body| {
            serde_json::json!({
                "shape": body.shape,
                "package": { "id": body.package.id().to_string(), "dir": body.package.dir() },
                "network": body.net,
                "tracking": format!("{:?}", body.tracking),
            })
        });
        Ok(serde_json::json!({
            "status": status,
            "host": facts,
            "config": self.config,
            "machine": body,
        }))
    }
}
