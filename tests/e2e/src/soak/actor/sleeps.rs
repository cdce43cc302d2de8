//! A machine of a soak that sleeps in a store, and is woken as it was, or as it was before.

use super::{Actor, Done};
use crate::{
    command::say,
    soak::{PATIENCE, history::Part},
};
use drafter::runner::api::SuspendReport;
use std::fs;

/// After so many sleeps a machine has a new store: packs are never made smaller.
const SLEEPS_IN_A_STORE: usize = 8;

/// A generation that can be gone back to.
struct Generation {
    number: u64,
    /// What the machine remembers in it.
    past: Vec<Part>,
}

/// A machine's sleeps.
#[derive(Default)]
pub(super) struct Sleeps {
    /// The store's number, and those in it, the oldest first.
    store: u64,
    generations: Vec<Generation>,
}

impl Actor<'_> {
    /// Puts the machine to sleep and wakes it; as it was in an earlier generation, if one is named and
    /// there is one.
    pub(super) fn sleep(&mut self, elsewhere: bool, earlier: Option<u64>) -> Done {
        let (from, name) = (self.at, self.spec.name.clone());
        let host = self.host(from);
        let before = self.sleeps.store;
        if self.sleeps.generations.len() >= SLEEPS_IN_A_STORE {
            self.sleeps.store += 1;
            self.sleeps.generations.clear();
        }
        let place = self.world.folder.join("asleep");
        let store = |number: u64| place.join(format!("{name}-{number}"));
        let words = [
            "--store".to_owned(),
            format!("file://{}", store(self.sleeps.store).display()),
            "--keys".to_owned(),
            self.world.folder.join("keys").display().to_string(),
        ];
        fs::create_dir_all(&place).map_err(|e| format!("{}: {e}", place.display()))?;
        let begun = self.world.now();
        let mut command = self.world.stage().drafter(host);
        command.args(["--json", "suspend", &name]).args(&words);
        let said = say(&mut command, PATIENCE);
        if said.code != Some(0) {
            self.say(&format!("it does not sleep: {}", said.err.trim()));
            return self.settle();
        }
        let report: SuspendReport =
            serde_json::from_str(&said.out).map_err(|e| format!("{e}: {}", said.out))?;
        self.until("the runner of a machine that sleeps ends", || self.status(from).is_none())?;
        self.world.fleet(|fleet| fleet.runner_mut(from).kill());
        // It was paused in between.
        let past = self.remembers(begun, self.world.now());
        self.sleeps.generations.push(Generation { number: report.number, past });
        if before != self.sleeps.store {
            let _ = fs::remove_dir_all(store(before));
        }
        let host = self.wakes_at(host, elsewhere);
        let mut resume = vec!["resume".to_owned(), name, "--package".to_owned()];
        resume.push(self.spec.package.display().to_string());
        resume.extend(words);
        let older = self.sleeps.generations.len() as u64 - 1;
        if let Some(generation) = earlier.filter(|_| older > 0) {
            let chosen = older - 1 - generation % older;
            let chosen = &self.sleeps.generations[chosen as usize];
            self.say(&format!(
                "it slept as generation {}, back to {}",
                report.number, chosen.number
            ));
            resume.extend(["--generation".to_owned(), chosen.number.to_string()]);
            let past = chosen.past.clone();
            // No connection knows it as it will be.
            let at = self.clients.hang_up();
            self.end_life(at, &format!("until it went back from generation {}", report.number));
            (self.past, self.since) = (past, at);
        }
        let spec = self.spec.clone();
        self.at = self.insist("it is woken", || {
            self.world.fleet(|fleet| fleet.start(host, &spec, resume.clone()))
        })?;
        self.until("it runs with all of its blocks", || {
            let status = self.status(self.at);
            status.is_some_and(|s| s.state == "running" && s.missing.values().all(|n| *n == 0))
        })
    }
}
