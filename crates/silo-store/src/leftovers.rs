//! What commands that were killed leave in a store besides packs and maps, which
//! [`Store::mark`] finds: objects of a probe, marks of a collection that never condemned anything,
//! pins of readers that are gone, and, in a local folder, files that were being written.
//!
//! None of them is ever referred to. What must hold: nothing is deleted that somebody may be at work
//! on; so only what is older than the grace goes, and never what is younger than a minute.

use crate::{
    error::Result,
    layout::{self, COLLECTIONS, ObjectId, PROBES},
    store::Store,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// No probe and no write of a file takes longer.
const YOUNG: Duration = Duration::from_secs(60);
/// How deep a store's folder is.
const DEPTH: usize = 8;

impl Store {
    /// Deletes what killed commands left that is older than `grace` and a minute; with `dry_run` only
    /// says what that is.
    ///
    /// # Errors
    /// If the store cannot be read or written; what was deleted by then is deleted.
    pub fn tidy(&self, grace: Duration, dry_run: bool) -> Result<Vec<String>> {
        if !dry_run {
            self.must_write()?;
        }
        let (mut leftovers, now) = self.old_probes(grace.max(YOUNG), dry_run)?;
        leftovers.extend(self.idle_marks(now, grace.max(YOUNG))?);
        leftovers.extend(self.old_pins(now, grace.max(YOUNG))?);
        if !dry_run {
            for object in &leftovers {
                self.remote.delete(object)?;
            }
        }
        // A listing does not have these, and they are no objects.
        let now = SystemTime::now();
        for path in self.remote.folder().into_iter().flat_map(staged) {
            let modified = path.metadata().and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|modified| now.duration_since(modified).ok());
            // Gone meanwhile: whoever wrote it has ended well.
            if age.is_some_and(|age| age >= grace.max(YOUNG))
                && (dry_run || std::fs::remove_file(&path).is_ok())
            {
                leftovers.push(path.display().to_string());
            }
        }
        Ok(leftovers)
    }

    /// Objects of probes, and the time by the store's clock (without writing, by this host's).
    fn old_probes(&self, age: Duration, dry_run: bool) -> Result<(Vec<String>, SystemTime)> {
        let own = format!("{PROBES}/{}", ObjectId::of(&crate::keys::random::<16>()?));
        if !dry_run {
            self.remote.start_put(&own, bytes::Bytes::from_static(b"silo")).wait()?;
        }
        let mut listed = self.remote.list(PROBES, None)?;
        let mine = listed.iter().position(|probe| probe.object == own);
        let now = match mine.map(|at| listed.swap_remove(at)) {
            Some(found) => {
                self.remote.delete(&own)?;
                found.modified
            }
            None => SystemTime::now(),
        };
        let old = |modified| now.duration_since(modified).is_ok_and(|since| since >= age);
        let old = listed.into_iter().filter(|probe| old(probe.modified));
        Ok((old.map(|probe| probe.object).collect(), now))
    }

    /// Objects of collections that ended before they condemned anything.
    fn idle_marks(&self, now: SystemTime, age: Duration) -> Result<Vec<String>> {
        let mut collections: BTreeMap<u64, (BTreeSet<String>, SystemTime)> = BTreeMap::new();
        for listed in self.remote.list(COLLECTIONS, None)? {
            let Some((number, _)) = layout::parse_collection(&listed.object) else { continue };
            let (objects, newest) =
                collections.entry(number).or_insert_with(|| (BTreeSet::new(), listed.modified));
            *newest = listed.modified.max(*newest);
            objects.insert(listed.object);
        }
        let idle = |number: u64, objects: &BTreeSet<String>, newest: SystemTime| {
            let condemned = ["tombs", "done"]
                .iter()
                .any(|what| objects.contains(&layout::collection(number, what)));
            !condemned && now.duration_since(newest).is_ok_and(|since| since >= age)
        };
        let idle = collections.into_iter().filter(|(n, (objects, at))| idle(*n, objects, *at));
        Ok(idle.flat_map(|(_, (objects, _))| objects).collect())
    }
}

/// Files of a local store that were being written: `object_store` names them as the object, a `#`
/// and a number.
fn staged(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![(folder.to_owned(), 0)]);
    while let Some((folder, depth)) = folders.pop() {
        // Unreadable or gone: there is nothing to tidy.
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let number = name.split_once('#').map(|(_, number)| number);
            let is_number =
                number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
            if kind.is_dir() && depth < DEPTH {
                folders.push((entry.path(), depth + 1));
            } else if kind.is_file() && is_number {
                found.push(entry.path());
            }
        }
    }
    found.sort_unstable();
    found
}
