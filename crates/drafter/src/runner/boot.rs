//! A machine that begins on this host, from its package.

use super::{
    EDGE_LIMIT, Runner,
    config::Boot,
    hosted::{self, Hosted},
    take_over,
};
use crate::{
    driver::Start,
    lease::{AttemptId, Nonce, Outcome, Record},
    migrate::switchover::{FlipEpoch, Holding},
    package::Package,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

impl Runner {
    /// A package by path: opened and checked.
    pub(super) fn open_package(&self, path: &Path) -> Result<Package, String> {
        let package = Package::open_with(path, &self.cache).map_err(|e| e.to_string())?;
        package.verify(&self.cache).map_err(|e| e.to_string())?;
        Ok(package)
    }

    /// A package by identity, among those that the runner was given.
    pub(super) fn find_package(&self, id: &str) -> Option<Package> {
        let mut candidates: Vec<PathBuf> = Vec::new();
        for path in &self.config.packages {
            candidates.push(path.clone());
            if let Ok(entries) = std::fs::read_dir(path) {
                candidates.extend(entries.flatten().map(|e| e.path()));
            }
        }
        candidates.into_iter().find_map(|path| {
            let package = Package::open_with(&path, &self.cache).ok()?;
            (package.id().to_string() == id).then_some(package)
        })
    }

    /// Takes the lease for a machine that starts here.
    pub(super) fn acquire(&self) -> Result<Holding, String> {
        let attempt = AttemptId::random().map_err(|e| e.to_string())?;
        let nonce = Nonce::random().map_err(|e| e.to_string())?;
        let found = self.store.read(&self.name).map_err(|e| e.to_string())?;
        let new = match &found {
            None => Record::first(self.name.clone(), self.host.clone(), attempt, nonce),
            Some(record) if record.owner == self.host => {
                record.taken(self.host.clone(), attempt, nonce)
            }
            Some(record) => {
                return Err(format!(
                    "host \"{}\" owns it ({}); stop it there, or remove its lease in {} if that \
                     host will never come back",
                    record.owner,
                    record.epoch,
                    self.config.lease.display()
                ));
            }
        };
        match self.store.compare_and_set(&self.name, found.as_ref(), &new) {
            Ok(Outcome::Won) => Ok(Holding::new(new)),
            Ok(Outcome::Lost(_)) => Err("another host took its lease just now".into()),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(super) fn boot(self: &Arc<Self>, boot: &Boot) -> Result<(), String> {
        let package = self.open_package(&boot.package)?;
        let facts = self.driver.facts().map_err(|e| e.to_string())?;
        let (shape, net) = hosted::shape_of(&self.config.machine, &package, boot, &facts);
        let holding = self.acquire()?;
        let paths = self.site();
        let content = hosted::new_content(&shape, &package, &paths.disks, boot.keep_disks)
            .map_err(|e| e.to_string())?;
        let site = paths.site(&*self.driver, &self.path);
        let mut body = Hosted::build(shape, package, net, content, &site, Start::Boot, None)
            .map_err(|e| e.to_string())?;
        let flip = FlipEpoch::of(holding.record.epoch, 0).0;
        // Learns here that a port of the edge is taken, before the guest runs.
        let started = body.begin(flip).and_then(|()| body.settled(flip, EDGE_LIMIT));
        if let Err(error) = started {
            self.lock().net.clone_from(&body.net);
            body.tear_down();
            return Err(error.to_string());
        }
        let noted = take_over::Noted::of(&body, false);
        self.install(Box::new(body), holding, None);
        self.complete(&noted);
        Ok(())
    }
}
