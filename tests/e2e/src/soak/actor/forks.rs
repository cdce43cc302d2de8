//! Copies of a machine of a soak: each has the registers that the machine had, and then its own.

use super::{ANSWER, Actor, Done};
use crate::{
    command::say,
    soak::{
        PATIENCE,
        history::{Did, Life, NOTHING, Operation, Part},
        registers::KEYS,
    },
};
use drafter::runner::{
    api::{Client, OutputStream, Reply, Request},
    state::MachineDir,
};
use std::{collections::BTreeMap, fs, net::Ipv4Addr};

/// What a copy writes begins here; no client of a machine comes so far.
const VALUES: u64 = 1 << 48;

/// A machine's copies.
#[derive(Default)]
pub(super) struct Forks {
    made: u16,
    /// What they were asked and told.
    pub(super) history: Vec<Operation>,
}

impl Actor<'_> {
    /// Copies the machine, uses the copy, and ends it.
    pub(super) fn fork(&mut self) -> Done {
        let host = self.host(self.at);
        self.forks.made += 1;
        let made = self.forks.made;
        let prefix = format!("{}-copy{made}", self.spec.name);
        let address = Ipv4Addr::new(10, 77, 1, 1 + (made % 250) as u8).to_string();
        let begun = self.world.now();
        let mut command = self.world.stage().drafter(host);
        command.args(["fork", &self.spec.name, "--prefix", &prefix, "--address", &address]);
        let said = say(&mut command, PATIENCE);
        let ended = self.world.now();
        let state = self.world.fleet(|fleet| fleet.state_of(host));
        let copy = MachineDir::at(&state, &format!("{prefix}-1"));
        let used = if said.code == Some(0) {
            let number = 1000 * u16::from(self.number) + made;
            let own = Part { machine: number, from: begun, to: u64::MAX, sure: u64::MAX };
            let mut parts = self.remembers(begun, ended);
            parts.push(own);
            self.lives.push(Life { name: format!("{prefix}-1"), parts });
            self.use_copy(&copy, number)
        } else {
            self.say(&format!("it is not copied: {}", said.err.trim()));
            Ok(())
        };
        let ended = self.end_copy(&copy);
        used.and(ended)?;
        self.settle()
    }

    /// Each register is read, written, and read again.
    fn use_copy(&mut self, copy: &MachineDir, number: u16) -> Done {
        for key in 0..KEYS {
            let value = VALUES + u64::from(number) * 1000 + u64::from(key);
            let register = format!("register:{key}");
            for write in [None, Some(value), None] {
                let written = value.to_string();
                let words = match write {
                    Some(_) => vec!["redis-cli", "SET", &register, &written],
                    None => vec!["redis-cli", "GET", &register],
                };
                let begun = self.world.now();
                let said = exec(copy, &words).map_err(|why| format!("its copy {number}: {why}"))?;
                let answered = Some(self.world.now());
                let did = match (write, said.trim()) {
                    (Some(value), "OK") => Did::Wrote(value),
                    (None, "") => Did::Saw(NOTHING),
                    (None, seen) if seen.parse::<u64>().is_ok() => {
                        Did::Saw(seen.parse().unwrap_or(NOTHING))
                    }
                    (_, said) => return Err(format!("its copy {number} says {said:?}")),
                };
                self.forks.history.push(Operation { machine: number, key, did, begun, answered });
            }
        }
        Ok(())
    }

    /// Ends a copy, however far it came, and removes what is left of it.
    fn end_copy(&self, copy: &MachineDir) -> Done {
        let alive = || matches!(copy.read_record(), Ok(Some(record)) if record.alive());
        if alive() {
            let asked = Client::connect(&copy.socket()).and_then(|mut client| {
                client.set_deadline(Some(PATIENCE))?;
                client.call(&Request::Stop { grace_s: 0 }, |_| {})
            });
            if let Err(error) = asked {
                self.say(&format!("its copy is not ended at once: {error}"));
            }
            self.until("its copy has ended", || !alive())?;
        }
        match fs::remove_dir_all(copy.root()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("{}: {e}", copy.root().display()))
            }
            _ => Ok(()),
        }
    }
}

/// Runs a command in a guest; what it wrote.
fn exec(machine: &MachineDir, words: &[&str]) -> Done<String> {
    let mut client = Client::connect(&machine.socket()).map_err(|e| e.to_string())?;
    client.set_deadline(Some(PATIENCE)).map_err(|e| e.to_string())?;
    let argv = words.iter().map(|&word| word.to_owned()).collect();
    let request = Request::Exec { argv, env: BTreeMap::new(), timeout_s: ANSWER.as_secs() * 6 };
    let mut out = String::new();
    let value = client.call(&request, |reply| {
        if let Reply::Output { stream: OutputStream::Stdout, text } = reply {
            out.push_str(text);
        }
    });
    let value = value.map_err(|e| format!("{}: {e}", words.join(" ")))?;
    match value.get("exit_code").and_then(serde_json::Value::as_i64) {
        Some(0) => Ok(out),
        _ => Err(format!("{} ended: {value}", words.join(" "))),
    }
}
