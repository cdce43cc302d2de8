//! Collection beside writers that stall at the worst moment.

use crate::support::*;
use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};
use silo_block::io::BlockDevice;
use silo_store::{
    Depth, Keeper, Keeping, LineWriter, Objects, Reading, Retention, Store, StoreError, Swept,
    WriterOptions, capture::Want,
};
use std::{
    fmt,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime},
};

type Meanwhile = Box<dyn FnOnce() + Send>;

/// A store in which something happens just before an entry is written: the writer stalled there.
struct Stalling {
    store: Arc<InMemory>,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl fmt::Debug for Stalling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stalling")
    }
}

impl fmt::Display for Stalling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stalling")
    }
}

#[async_trait]
impl ObjectStore for Stalling {
    async fn put_opts(&self, path: &Path, payload: PutPayload, o: PutOptions) -> Result<PutResult> {
        if path.as_ref().contains("lines/") {
            let meanwhile = self.meanwhile.lock().unwrap().take();
            if let Some(meanwhile) = meanwhile {
                tokio::task::block_in_place(meanwhile);
            }
        }
        self.store.put_opts(path, payload, o).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        o: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(path, o).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(path, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}

fn verified(store: &Arc<Store>) {
    let (done, stop) = (Reading::default(), AtomicBool::new(false));
    let verified = store.verify(&ring(), &line("vm"), None, Depth::Full, &done, &stop).unwrap();
    assert!(verified.is_well(), "{verified:?}");
}

fn collect(store: &Store) {
    store.mark(Duration::ZERO, false).unwrap();
    store.sweep(Duration::ZERO).unwrap();
}

#[test]
fn what_no_generation_refers_to_goes_after_the_grace_and_a_dry_run_says_what_that_is() {
    let (_, store) = in_memory();
    let disk = Disk::new(noise(1, 300_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    round(&mut writer, &group, Want::Changed).unwrap();
    group.device(0).write_at(0, &noise(2, 300_000)).unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    assert_eq!(store.mark(Duration::ZERO, true).unwrap(), None, "all is referred to");
    store.prune(&line("vm"), &Retention::default(), SystemTime::now(), false).unwrap();
    assert_eq!(store.mark(Duration::from_secs(3600), true).unwrap(), None, "all is young");
    let would = store.mark(Duration::ZERO, true).unwrap().unwrap();
    assert_eq!(would.objects.len(), 1);
    assert_eq!(store.sweep(Duration::ZERO).unwrap(), Swept::Nothing, "a dry run condemns nothing");
    let marked = store.mark(Duration::ZERO, false).unwrap().unwrap();
    assert_eq!(marked.objects, would.objects);
    assert!(matches!(store.sweep(Duration::from_secs(3600)).unwrap(), Swept::Wait(_)));
    let Swept::Done(swept) = store.sweep(Duration::ZERO).unwrap() else { panic!("it was due") };
    assert_eq!((swept.objects, swept.spared), (would.objects, 0));
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    verified(&store);
    // The writer meets the barrier, and goes on.
    group.device(0).write_at(5, b"on").unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    verified(&store);
}

#[test]
fn a_writer_that_stalls_before_its_commit_while_its_packs_are_collected_commits_nothing_that_is_gone()
 {
    let content = Arc::new(InMemory::new());
    let stalling = Arc::new(Stalling { store: content.clone(), meanwhile: Mutex::default() });
    let (store, others) = (over(stalling.clone()), over(content));
    let disk = Disk::new(noise(1, 300_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    round(&mut writer, &group, Want::Changed).unwrap();
    group.device(0).write_at(0, &noise(2, 300_000)).unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    // The content of the first generation comes back: known, so only referred to. Before the commit
    // the first generation is pruned, and what only it referred to is collected.
    group.device(0).write_at(0, &noise(1, 300_000)).unwrap();
    let other = others.clone();
    *stalling.meanwhile.lock().unwrap() = Some(Box::new(move || {
        other.prune(&line("vm"), &Retention::default(), SystemTime::now(), false).unwrap();
        collect(&other);
    }));
    let error = round(&mut writer, &group, Want::Changed).unwrap_err();
    assert!(matches!(error, StoreError::Busy(_)), "{error}");
    verified(&others);
    // New packs that nobody refers to yet are collected as well, if the grace is too short.
    let other = others.clone();
    *stalling.meanwhile.lock().unwrap() = Some(Box::new(move || collect(&other)));
    let error = round(&mut writer, &group, Want::Changed).unwrap_err();
    assert!(matches!(error, StoreError::Busy(_)), "{error}");
    verified(&others);
    let stored = round(&mut writer, &group, Want::Changed).unwrap();
    assert!(stored.content > 290_000, "stored again: {stored:?}");
    assert_eq!(newest(&others, "vm", "disk").unwrap(), disk.content());
    verified(&others);
}

#[test]
fn a_fork_that_stalls_while_its_parent_is_pruned_and_collected_is_refused() {
    let content = Arc::new(InMemory::new());
    let stalling = Arc::new(Stalling { store: content.clone(), meanwhile: Mutex::default() });
    let (store, others) = (over(stalling.clone()), over(content));
    let disk = Disk::new(noise(1, 300_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&others, "vm");
    let old = round(&mut writer, &group, Want::Changed).unwrap().number;
    group.device(0).write_at(0, &noise(2, 300_000)).unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    let (other, again) = (others.clone(), stalling.clone());
    // At the second entry of the fork, which is its commit; the first takes the line.
    *stalling.meanwhile.lock().unwrap() = Some(Box::new(move || {
        *again.meanwhile.lock().unwrap() = Some(Box::new(move || {
            other.prune(&line("vm"), &Retention::default(), SystemTime::now(), false).unwrap();
            collect(&other);
        }));
    }));
    let forked = LineWriter::fork(
        store,
        &ring(),
        (&line("vm"), old),
        &line("branch"),
        WriterOptions::default(),
    );
    assert!(matches!(forked, Err(StoreError::Busy(_))));
    assert!(matches!(newest(&others, "branch", "disk"), Err(StoreError::NoGeneration { .. })));
}

#[test]
fn what_killed_commands_left_goes_when_it_is_old_and_nothing_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let url: silo_store::StoreUrl = format!("file://{}", dir.path().display()).parse().unwrap();
    let store =
        Store::open(&url, silo_store::Access::Write, &silo_store::Environment::default(), limits())
            .unwrap();
    let disk = Disk::new(noise(1, 1 << 20));
    round(&mut writer(&store, "vm"), &group(&[("disk", 4096, &disk)]), Want::Changed).unwrap();
    // A probe, the mark of a collection, a pack that was being written: each old and young.
    let leave = |name: &str, is_old: bool| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let file = std::fs::File::create(&path).unwrap();
        if is_old {
            file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
        }
        name.to_owned()
    };
    let (old, young) = ("a".repeat(64), "b".repeat(64));
    let mut wanted = vec![
        leave(&format!("probe/{old}"), true),
        leave("collections/0000000000000001/began", true),
        leave(&format!("packs/aa/{old}#1"), true),
    ];
    let mut stay = vec![
        leave(&format!("probe/{young}"), false),
        leave("collections/0000000000000002/began", false),
        leave(&format!("packs/bb/{young}#1"), false),
        // What condemned something is a collection's to deal with.
        leave("collections/0000000000000003/began", true),
        leave("collections/0000000000000003/tombs", true),
        leave("collections/0000000000000003/done", true),
    ];
    let there = |name: &String| dir.path().join(name).exists();
    let short = |found: Vec<String>| -> Vec<String> {
        let root = format!("{}/", dir.path().display());
        let mut names: Vec<_> = found.iter().map(|name| name.replace(&root, "")).collect();
        names.sort_unstable();
        names
    };
    wanted.sort_unstable();
    assert_eq!(short(store.tidy(Duration::ZERO, true).unwrap()), wanted);
    assert!(wanted.iter().chain(&stay).all(there), "a dry run has deleted something");
    let hours = Duration::from_secs(2 * 3600);
    assert!(store.tidy(hours, false).unwrap().is_empty(), "younger than the grace");
    assert_eq!(short(store.tidy(Duration::ZERO, false).unwrap()), wanted);
    assert!(!wanted.iter().any(there));
    stay.retain(|name| !there(name));
    assert!(stay.is_empty(), "{stay:?} went");
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
}

#[test]
fn a_history_that_is_written_all_the_time_stays_bounded_and_its_newest_generations_whole() {
    let (backend, store) = in_memory();
    let disk = Disk::new(noise(1, 200_000));
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(&store, "vm");
    let keeping = Keeping {
        retention: Retention { last: 3, ..Retention::default() },
        every: Duration::from_millis(5),
        grace: Some(Duration::ZERO),
    };
    let keeper = Keeper::start(Arc::clone(&store), line("vm"), keeping).unwrap();
    let objects = Objects::with_backend(backend, "folder", "the same", limits()).unwrap();
    let packs = || objects.list("packs").unwrap().len();
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut written, mut most) = (0, 0);
    // Enough was collected, and not all of it at once: the keeper may have had no turn for long.
    while keeper.kept().collected < 40 || most as u64 >= written {
        assert!(Instant::now() < deadline, "{:?} after {written} generations", keeper.kept());
        written += 1;
        group.device(0).write_at(0, &noise(written, 200_000)).unwrap();
        // A collection may ask for what this round was to refer to: the next one stores it.
        match round(&mut writer, &group, Want::Changed) {
            Ok(_) | Err(StoreError::Busy(_)) => {}
            Err(error) => panic!("{error}"),
        }
        most = most.max(packs());
    }
    drop(keeper);
    // The last collection may be met only now.
    while let Err(error) = round(&mut writer, &group, Want::Everything) {
        assert!(matches!(error, StoreError::Busy(_)), "{error}");
        assert!(Instant::now() < deadline, "{error}");
    }
    assert_eq!(newest(&store, "vm", "disk").unwrap(), disk.content());
    verified(&store);
    store.prune(&line("vm"), &keeping.retention, SystemTime::now(), false).unwrap();
    assert_eq!(store.generations(&line("vm")).unwrap().len(), 3);
}
