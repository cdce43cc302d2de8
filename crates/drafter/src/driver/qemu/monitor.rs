//! A control connection to a QEMU that no driver looks after: the baseline of benchmarks.

use super::qmp::Qmp;
use serde_json::Value;
use std::{path::Path, time::Duration};

/// QMP over a socket in the file system; one client at a time.
pub struct Monitor(Qmp);

impl Monitor {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// In a sentence, when nobody answers at `socket` within `limit`.
    pub fn connect(socket: &Path, limit: Duration) -> Result<Self, String> {
        Qmp::connect(socket, limit).map(Self).map_err(|error| error.to_string())
    }

    /// Executes one command.
    ///
    /// # Errors
    /// In a sentence: QEMU's refusal, or that it did not answer within `limit`.
    pub fn call(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, String> {
        self.0.call(command, arguments, limit).map_err(|error| error.to_string())
    }
}
