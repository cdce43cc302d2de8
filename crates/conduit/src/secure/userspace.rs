//! The tunnel in user space: `conduit tunnel run`, started and left to itself.

use super::{INTERFACE, NETWORK, Secure, address};
use crate::exec::KernelError;
use conduit_wg::PublicKey;
use std::{
    fs::{self, OpenOptions},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long a tunnel's process may take to answer.
const READY: Duration = Duration::from_secs(10);

impl Secure {
    /// Starts the tunnel's process, in a group of its own: it is to outlive this one.
    pub(super) fn start(&self) -> Result<Vec<PublicKey>, KernelError> {
        let fail = |e: &dyn std::fmt::Display| KernelError::new("start the tunnel's process", e);
        let (program, first) = self.config.program.split_first().ok_or_else(|| {
            fail(&"nothing says which program it is; start `conduit tunnel run` by hand")
        })?;
        fs::create_dir_all(&self.config.state).map_err(|e| fail(&e))?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.config.state.join("tunnel.log"))
            .map_err(|e| fail(&e))?;
        let (own, bits) = (address(self.real.overlay), NETWORK.1);
        let mut command = Command::new(program);
        command
            .args(first)
            .args(["tunnel", "run", "--interface", INTERFACE, "--mtu", &self.mtu.to_string()])
            .args(["--listen", &format!("{}:{}", self.real.underlay, self.config.port)])
            .args(["--address", &format!("{own}/{bits}")])
            .arg("--state")
            .arg(self.config.state.join("tunnel"))
            .arg("--control")
            .arg(self.config.control())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0);
        if let Some(every) = self.config.rotate_every {
            command.args(["--rotate-every", &format!("{}s", every.as_secs())]);
        }
        let mut child = command.spawn().map_err(|e| fail(&e))?;
        let deadline = Instant::now() + READY;
        loop {
            if let Ok(status) = conduit_wg::status(&self.config.control()) {
                // So that it leaves no zombie while this process lives.
                thread::spawn(move || child.wait());
                self.tell(&self.known()).map(drop)?;
                return Ok(status.keys);
            }
            let ended = child.try_wait().map_err(|e| fail(&e))?;
            if let Some(status) = ended {
                let log = self.config.state.join("tunnel.log");
                return Err(fail(&format!("it ended ({status}); see {}", log.display())));
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(fail(&format!("it did not answer within {READY:?}")));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
