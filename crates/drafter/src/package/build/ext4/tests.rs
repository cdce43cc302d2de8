use super::super::tree::{Merge, Meta};
use super::*;

fn file(dir: &Path, content: &[u8]) -> Kind {
    let blob = dir.join(format!("{}", Blake3::of(content)));
    fs::write(&blob, content).unwrap();
    Kind::File { blob, bytes: content.len() as u64 }
}

fn insert(tree: &mut Tree, path: &str, meta: Meta, kind: Kind) {
    tree.insert(path.as_bytes(), Inode { meta, kind }, Merge::Replace).unwrap();
}

/// A tree with one of everything, and names that try to be something else.
fn sample(dir: &Path) -> Tree {
    let mut tree = Tree::new();
    let meta = Meta { mode: 0o4755, uid: 100, gid: 70_000, mtime: 1_600_000_000, xattrs: vec![] };
    insert(&mut tree, "a \"b\" c/<12>", meta, file(dir, b"quoted"));
    insert(&mut tree, "usr/bin/x", Meta::root(0o755), file(dir, &[1; 10_000]));
    tree.link(b"usr/bin/y", b"usr/bin/x").unwrap();
    insert(&mut tree, "bin", Meta::root(0o777), Kind::Symlink { target: b"usr/bin".to_vec() });
    let long = "t".repeat(300);
    insert(&mut tree, "long", Meta::root(0o777), Kind::Symlink { target: long.into() });
    insert(&mut tree, "dev/null", Meta::root(0o666), Kind::Character { major: 1, minor: 3 });
    insert(&mut tree, "run/fifo", Meta::root(0o600), Kind::Fifo);
    insert(&mut tree, "tmp", Meta::root(0o1777), Kind::Directory);
    let mut capable = Meta::root(0o755);
    capable.xattrs = vec![(b"user.note".to_vec(), b"hello".to_vec())];
    insert(&mut tree, "capable", capable, file(dir, b""));
    tree
}

fn debugfs(image: &Path, request: &str) -> String {
    let output = command("debugfs", ["-R", request]).arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn make(dir: &Path, name: &str) -> (std::path::PathBuf, Blake3) {
    let image = dir.join(name);
    let hash = write(&sample(dir), &image, 64 << 20, &Blake3::of(b"seed")).unwrap();
    (image, hash)
}

#[test]
fn everything_in_the_tree_is_in_the_image_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (image, hash) = make(dir.path(), "image");
    assert_eq!(files::hash_file(&image).unwrap(), (hash, 64 << 20));
    assert!(files::allocated(&image).unwrap() < 4 << 20, "the journal's zeros are no holes");
    assert_eq!(debugfs(&image, "cat \"/a \"\"b\"\" c/<12>\""), "quoted");
    let stat = debugfs(&image, "stat \"/a \"\"b\"\" c/<12>\"");
    for part in ["Mode:  04755", "User:   100", "Group: 70000", "mtime: 0x5f5e1000"] {
        assert!(stat.contains(part), "{part}: {stat}");
    }
    assert_eq!(debugfs(&image, "cat /usr/bin/y").len(), 10_000);
    assert!(debugfs(&image, "stat /usr/bin/x").contains("Links: 2"));
    assert!(debugfs(&image, "stat /bin").contains("Fast link dest: \"usr/bin\""));
    assert!(debugfs(&image, "stat /long").contains("Type: symlink    Mode:  0777"));
    assert!(debugfs(&image, "stat /dev/null").contains("Device major/minor number: 01:03"));
    assert!(debugfs(&image, "stat /run/fifo").contains("Type: FIFO"));
    assert!(debugfs(&image, "stat /tmp").contains("Mode:  01777"));
    assert!(debugfs(&image, "ea_get /capable user.note").contains("hello"));
}

#[test]
fn the_same_tree_gives_the_same_bytes_at_another_time_and_place() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = make(one.path(), "image").1;
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(make(two.path(), "another").1, first);
    let other = Blake3::of(b"another seed");
    let image = two.path().join("third");
    assert_ne!(write(&sample(two.path()), &image, 64 << 20, &other).unwrap(), first);
}

#[test]
fn a_name_with_a_line_break_cannot_become_a_command() {
    let dir = tempfile::tempdir().unwrap();
    for path in ["a\nrm /bin", "d/\n"] {
        let mut tree = sample(dir.path());
        insert(&mut tree, path, Meta::root(0o644), file(dir.path(), b"x"));
        let image = dir.path().join(format!("image{}", path.len()));
        let error = write(&tree, &image, 64 << 20, &Blake3::of(b"")).unwrap_err();
        assert!(error.to_string().contains("line break"), "{error}");
    }
}

#[test]
fn a_root_that_does_not_fit_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = sample(dir.path());
    insert(&mut tree, "big", Meta::root(0o644), file(dir.path(), &vec![3; 20 << 20]));
    let error = write(&tree, &dir.path().join("image"), 16 << 20, &Blake3::of(b"")).unwrap_err();
    assert!(matches!(error, PackageError::TooLarge { .. }), "{error}");
    assert!(error.to_string().contains("--size"), "{error}");
}
