use super::manifest::{FileEntry, tests::sample};
use super::*;
use std::{
    io::Write as _,
    os::unix::fs::{FileExt as _, MetadataExt as _},
};

const HOLE: usize = 1 << 20;

/// The content of the sample's disk: a block, a hole, a block.
fn disk() -> Vec<u8> {
    let mut content = vec![0; HOLE];
    content[..4096].fill(7);
    content[HOLE - 4096..].fill(9);
    content
}

fn sample_with_disk() -> Manifest {
    let mut manifest = sample();
    manifest.devices[0].bytes = HOLE as u64;
    manifest.devices[0].blake3 = Blake3::of(&disk());
    manifest
}

/// A package in `dir`, with the manifest as given.
fn write_package(dir: &Path, manifest: &Manifest) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("kernel"), b"kernel").unwrap();
    fs::write(dir.join("initramfs.cpio"), b"initramfs").unwrap();
    fs::write(dir.join("root.ext4"), disk()).unwrap();
    fs::write(dir.join(MANIFEST_FILE), manifest.to_json()).unwrap();
}

struct Setup {
    dir: tempfile::TempDir,
    cache: Cache,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        write_package(&dir.path().join("pkg"), &sample_with_disk());
        Self { dir, cache }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self) -> Result<Package> {
        Package::open_with(&self.path("pkg"), &self.cache)
    }

    fn packed(&self) -> PathBuf {
        let path = self.path("pkg.tar.zst");
        archive::pack(&self.open().unwrap(), &path, &self.cache).unwrap();
        path
    }

    /// Writes an archive of the given entries and unpacks it.
    fn unpack(&self, entries: &[Entry<'_>]) -> PackageError {
        let path = self.path("made.tar.zst");
        fs::write(&path, pack_entries(entries)).unwrap();
        let error = archive::unpack(&path, &self.path("out"), 1 << 30).unwrap_err();
        assert!(!self.path("out").exists(), "something was left behind");
        let left = fs::read_dir(self.dir.path()).unwrap().count();
        assert!(left <= 4, "scratch was left behind");
        error
    }
}

/// Name, kind, declared size (of the content if None), content.
struct Entry<'a>(&'a str, tar::EntryType, Option<u64>, &'a [u8]);

fn regular<'a>(name: &'a str, content: &'a [u8]) -> Entry<'a> {
    Entry(name, tar::EntryType::Regular, None, content)
}

/// An archive with entries that the `tar` crate would not write by itself.
fn pack_entries(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut tar = Vec::new();
    for Entry(name, kind, size, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(size.unwrap_or(content.len() as u64));
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_cksum();
        tar.extend(header.as_bytes());
        tar.extend(*content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    zstd::encode_all(&*tar, 1).unwrap()
}

/// The entries of a good archive.
fn good_entries<'a>(manifest: &'a str, disk: &'a [u8]) -> Vec<Entry<'a>> {
    vec![
        regular("manifest.json", manifest.as_bytes()),
        regular("kernel", b"kernel"),
        regular("initramfs.cpio", b"initramfs"),
        regular("root.ext4", disk),
    ]
}

/// Makes a change of a file as old as it must be to be remembered.
fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(150));
}

#[test]
fn a_package_opens_and_names_its_files() {
    let setup = Setup::new();
    let package = setup.open().unwrap();
    assert_eq!(package.id(), sample_with_disk().id());
    assert_eq!(fs::read(package.kernel()).unwrap(), b"kernel");
    assert_eq!(fs::read(package.initramfs()).unwrap(), b"initramfs");
    assert!(package.device("root").unwrap().ends_with("root.ext4"));
    assert_eq!(package.device("other"), None);
}

#[test]
fn verification_reads_everything_once_and_then_only_what_changed() {
    let setup = Setup::new();
    settle();
    let package = setup.open().unwrap();
    let first = package.verify(&setup.cache).unwrap();
    assert_eq!((first.files, first.hashed_bytes), (3, first.bytes));
    assert_eq!(package.verify(&setup.cache).unwrap().hashed_bytes, 0);
    // The same content written again: read again, and still good.
    fs::write(package.kernel(), b"kernel").unwrap();
    assert_eq!(package.verify(&setup.cache).unwrap().hashed_bytes, 6);
}

#[test]
fn a_flipped_bit_is_found_even_when_length_and_time_are_as_before() {
    let setup = Setup::new();
    settle();
    let package = setup.open().unwrap();
    package.verify(&setup.cache).unwrap();
    let path = package.device("root").unwrap();
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[8], 4095).unwrap();
    file.set_modified(before).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
    let error = package.verify(&setup.cache).unwrap_err();
    assert!(
        matches!(&error, PackageError::Tampered { file, .. } if file == "root.ext4"),
        "{error}"
    );
    assert!(error.to_string().contains("tampered"), "{error}");
}

#[test]
fn hop_check_27_missing_truncated_and_replaced_files_are_told_apart_at_opening() {
    let setup = Setup::new();
    let root = setup.path("pkg/root.ext4");
    fs::File::options().write(true).open(&root).unwrap().set_len(4096).unwrap();
    assert!(setup.open().unwrap_err().to_string().contains("truncated"));
    fs::remove_file(&root).unwrap();
    let error = setup.open().unwrap_err();
    assert!(matches!(error, PackageError::Missing { .. }), "{error}");
    std::os::unix::fs::symlink("/etc/passwd", &root).unwrap();
    assert!(setup.open().unwrap_err().to_string().contains("not a regular file"));
}

#[test]
fn what_is_no_package_is_called_foreign() {
    let setup = Setup::new();
    for path in ["cache", "file.txt", "empty"] {
        let path = setup.path(path);
        if path.ends_with("file.txt") {
            fs::write(&path, b"hello").unwrap();
        } else {
            fs::create_dir_all(&path).unwrap();
        }
        let error = Package::open_with(&path, &setup.cache).unwrap_err();
        assert!(matches!(error, PackageError::Foreign { .. }), "{error}");
    }
    let error = Package::open_with(Path::new("/dev/null"), &setup.cache).unwrap_err();
    assert!(matches!(error, PackageError::Foreign { .. }), "{error}");
}

#[test]
fn a_packed_package_unpacks_to_the_same_with_its_holes() {
    let setup = Setup::new();
    let archive = setup.packed();
    let package = archive::unpack(&archive, &setup.path("out"), 1 << 30).unwrap();
    assert_eq!(package.id(), setup.open().unwrap().id());
    package.verify(&setup.cache).unwrap();
    let root = package.device("root").unwrap();
    assert_eq!(fs::read(&root).unwrap(), disk());
    assert!(fs::metadata(&root).unwrap().blocks() * 512 < HOLE as u64 / 2, "holes were filled");
    // A second package is not unpacked over the first.
    assert!(archive::unpack(&archive, &setup.path("out"), 1 << 30).is_err());
    package.verify(&setup.cache).unwrap();
}

#[test]
fn the_same_package_packs_to_the_same_bytes() {
    let setup = Setup::new();
    let first = fs::read(setup.packed()).unwrap();
    assert_eq!(fs::read(setup.packed()).unwrap(), first);
}

#[test]
fn an_archive_opens_by_way_of_the_cache_and_only_once() {
    let setup = Setup::new();
    let archive = setup.packed();
    let first = Package::open_with(&archive, &setup.cache).unwrap();
    assert_eq!(first.id(), setup.open().unwrap().id());
    assert!(first.dir().starts_with(setup.cache.root().canonicalize().unwrap()));
    let inode = fs::metadata(first.kernel()).unwrap().ino();
    let again = Package::open_with(&archive, &setup.cache).unwrap();
    assert_eq!(fs::metadata(again.kernel()).unwrap().ino(), inode);
}

#[test]
fn hop_check_27_an_archive_cut_anywhere_is_refused_and_leaves_nothing() {
    let setup = Setup::new();
    let archive = setup.packed();
    let whole = fs::read(&archive).unwrap();
    for end in (0..whole.len()).step_by(whole.len() / 50).chain([whole.len() - 1]) {
        fs::write(&archive, &whole[..end]).unwrap();
        let error = archive::unpack(&archive, &setup.path("out"), 1 << 30).unwrap_err();
        let right = matches!(error, PackageError::Damaged { .. } | PackageError::Foreign { .. });
        assert!(right && !setup.path("out").exists(), "cut at {end}: {error}");
    }
}

#[test]
fn hop_check_27_a_changed_byte_anywhere_in_an_archive_is_noticed() {
    let setup = Setup::new();
    let archive = setup.packed();
    let whole = fs::read(&archive).unwrap();
    for at in (0..whole.len()).step_by(whole.len() / 50) {
        let mut changed = whole.clone();
        changed[at] ^= 0x10;
        fs::write(&archive, changed).unwrap();
        if let Ok(package) = archive::unpack(&archive, &setup.path("out"), 1 << 30) {
            // A bit that means nothing (of the frame's header): then nothing may differ.
            assert_eq!(package.id(), sample_with_disk().id(), "changed at {at}");
            fs::remove_dir_all(setup.path("out")).unwrap();
        }
    }
}

#[test]
fn the_archives_made_for_these_tests_are_good_ones() {
    let setup = Setup::new();
    let (manifest, disk) = (sample_with_disk().to_json(), disk());
    fs::write(setup.path("a.tar.zst"), pack_entries(&good_entries(&manifest, &disk))).unwrap();
    archive::unpack(&setup.path("a.tar.zst"), &setup.path("out"), 1 << 30).unwrap();
}

#[test]
fn a_file_that_is_not_the_one_of_the_manifest_is_called_tampered() {
    let setup = Setup::new();
    let (manifest, mut disk) = (sample_with_disk().to_json(), disk());
    disk[5] ^= 1;
    let error = setup.unpack(&good_entries(&manifest, &disk));
    assert!(
        matches!(&error, PackageError::Tampered { file, .. } if file == "root.ext4"),
        "{error}"
    );
}

#[test]
fn names_that_lead_elsewhere_are_refused_before_anything_is_written() {
    let setup = Setup::new();
    let (manifest, disk) = (sample_with_disk().to_json(), disk());
    for (name, why) in [
        ("../escape", "leaves the package's directory"),
        ("/etc/escape", "absolute"),
        ("a/b", "flat directory"),
        ("a/../../escape", "leaves the package's directory"),
        ("extra", "does not name it"),
        ("kernel", "comes twice"),
        ("manifest.json", "comes twice"),
    ] {
        let mut entries = good_entries(&manifest, &disk);
        entries.push(regular(name, b"x"));
        let text = setup.unpack(&entries).to_string();
        assert!(text.contains(why) && text.contains(&format!("{name:?}")), "{text}");
    }
}

#[test]
fn links_directories_devices_and_long_names_are_refused() {
    let setup = Setup::new();
    let (manifest, disk) = (sample_with_disk().to_json(), disk());
    for (kind, why) in [
        (tar::EntryType::Symlink, "it is a link"),
        (tar::EntryType::Link, "it is a link"),
        (tar::EntryType::Directory, "it is a directory"),
        (tar::EntryType::Char, "device node"),
        (tar::EntryType::GNULongName, "not a regular file"),
        (tar::EntryType::XHeader, "not a regular file"),
        (tar::EntryType::GNUSparse, "not a regular file"),
    ] {
        let mut entries = good_entries(&manifest, &disk);
        entries[1] = Entry("kernel", kind, None, b"");
        let text = setup.unpack(&entries).to_string();
        assert!(text.contains(why) && text.contains("kernel"), "{kind:?}: {text}");
    }
}

#[test]
fn sizes_are_checked_before_anything_is_written() {
    let setup = Setup::new();
    let disk = disk();
    let mut manifest = sample_with_disk();
    manifest.devices[0].bytes = 1 << 40;
    let error = setup.unpack(&good_entries(&manifest.to_json(), &disk));
    assert!(matches!(error, PackageError::TooLarge { limit: 0x4000_0000, .. }), "{error}");

    let manifest = sample_with_disk().to_json();
    let mut entries = good_entries(&manifest, &disk);
    entries[1] = Entry("kernel", tar::EntryType::Regular, Some(1 << 33), b"kernel");
    let error = setup.unpack(&entries);
    assert!(matches!(error, PackageError::WrongSize { found: 0x2_0000_0000, .. }), "{error}");

    let entries = [Entry("manifest.json", tar::EntryType::Regular, Some(1 << 33), b"{}")];
    let error = setup.unpack(&entries);
    assert!(matches!(error, PackageError::TooLarge { found: 0x2_0000_0000, .. }), "{error}");
}

#[test]
fn foreign_newer_and_incomplete_archives_are_told_apart() {
    let setup = Setup::new();
    let (manifest, disk) = (sample_with_disk().to_json(), disk());
    let error = setup.unpack(&[regular("etc/passwd", b"root")]);
    assert!(matches!(error, PackageError::Foreign { .. }), "{error}");
    let error = setup.unpack(&[]);
    assert!(matches!(error, PackageError::Foreign { .. }), "{error}");
    let newer = manifest.replace("\"version\": 1,", "\"version\": 9,");
    let error = setup.unpack(&good_entries(&newer, &disk));
    assert!(matches!(error, PackageError::NewerFormat { found: 9, .. }), "{error}");
    let error = setup.unpack(&good_entries(&manifest, &disk)[..3]);
    assert!(error.to_string().contains("root.ext4 is missing"), "{error}");
    let path = setup.path("plain.tar.zst");
    fs::File::create(&path).unwrap().write_all(b"not zstd").unwrap();
    let error = Package::open_with(&path, &setup.cache).unwrap_err();
    assert!(matches!(error, PackageError::Foreign { .. }), "{error}");
}

#[test]
fn a_damaged_package_is_not_packed() {
    let setup = Setup::new();
    let package = setup.open().unwrap();
    fs::write(package.kernel(), b"kernal").unwrap();
    let error = archive::pack(&package, &setup.path("x.tar.zst"), &setup.cache).unwrap_err();
    assert!(matches!(error, PackageError::Tampered { .. }), "{error}");
    assert!(!setup.path("x.tar.zst").exists());
}

#[test]
fn holes_are_kept_when_copied_and_dug_where_there_are_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a"), dir.path().join("b"));
    fs::write(&from, disk()).unwrap();
    let full = files::allocated(&from).unwrap();
    assert_eq!(files::dig_holes(&from).unwrap(), Blake3::of(&disk()));
    let taken = files::allocated(&from).unwrap();
    assert!(taken < full / 2, "{taken} of {full}");
    files::copy_sparse(&from, &to).unwrap();
    assert_eq!(fs::read(&to).unwrap(), disk());
    assert!(files::allocated(&to).unwrap() <= taken + 8192);
    let entry = FileEntry { file: "b".into(), bytes: HOLE as u64, blake3: Blake3::of(&disk()) };
    verify::check_size(dir.path(), &entry).unwrap();
}
