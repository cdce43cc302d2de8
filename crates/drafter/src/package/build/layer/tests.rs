use super::*;
use tar::EntryType;

/// Builds a layer as an image tool would.
pub(crate) struct LayerBuilder(tar::Builder<Vec<u8>>);

impl LayerBuilder {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub(crate) fn add(mut self, path: &str, kind: EntryType, mode: u32, content: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(7);
        header.set_mtime(1_000);
        header.set_size(content.len() as u64);
        // Not by `set_path`, which refuses what a hostile layer holds.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    pub(crate) fn file(self, path: &str, content: &[u8]) -> Self {
        self.add(path, EntryType::Regular, 0o644, content)
    }

    pub(crate) fn link(mut self, path: &str, kind: EntryType, target: &str) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o777);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000);
        header.set_size(0);
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.0.append(&header, &[][..]).unwrap();
        self
    }

    pub(crate) fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(records.iter().copied()).unwrap();
        self
    }

    pub(crate) fn build(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

struct Applied {
    _dir: tempfile::TempDir,
    tree: Tree,
}

impl Applied {
    fn names(&self) -> Vec<String> {
        let names = self.tree.names().skip(1);
        names.map(|(path, _)| String::from_utf8_lossy(path).into_owned()).collect()
    }

    fn content(&self, path: &str) -> Vec<u8> {
        match &self.tree.lookup(path.as_bytes()).unwrap().kind {
            Kind::File { blob, .. } => std::fs::read(blob).unwrap(),
            other => panic!("{path} is {other:?}"),
        }
    }
}

fn try_layers(layers: &[Vec<u8>], limit: u64) -> Result<Applied> {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::new(dir.path().to_owned(), limit);
    let mut tree = Tree::new();
    let rules = Rules {
        name: Path::new("layer"),
        merge: Merge::Replace,
        whiteouts: true,
        drop: &|path| path == b"dropped",
    };
    for layer in layers {
        apply(&mut tree, &**layer, &rules, &mut store)?;
    }
    Ok(Applied { _dir: dir, tree })
}

fn layers(layers: &[Vec<u8>]) -> Applied {
    try_layers(layers, 1 << 20).unwrap()
}

#[test]
fn files_come_with_content_owner_mode_and_time() {
    let applied = layers(&[LayerBuilder::new()
        .add("./usr/bin/", EntryType::Directory, 0o751, b"")
        .file("./usr/bin/a", b"content")
        .link("usr/bin/b", EntryType::Link, "usr/bin/a")
        .link("bin", EntryType::Symlink, "usr/bin")
        .file("dropped", b"x")
        .build()]);
    assert_eq!(applied.names(), ["bin", "usr", "usr/bin", "usr/bin/a", "usr/bin/b"]);
    assert_eq!(applied.content("bin/b"), b"content");
    let meta = &applied.tree.lookup(b"usr/bin/a").unwrap().meta;
    assert_eq!((meta.mode, meta.uid, meta.gid, meta.mtime), (0o644, 0, 7, 1_000));
    assert_eq!(applied.tree.lookup(b"usr/bin").unwrap().meta.mode, 0o751);
}

#[test]
fn whiteouts_remove_what_lower_layers_have_and_opaque_ones_all_of_it() {
    let lower = LayerBuilder::new()
        .file("a/keep", b"1")
        .file("a/gone", b"1")
        .file("b/one", b"1")
        .file("b/two/three", b"1")
        .build();
    let upper = LayerBuilder::new()
        .file("a/.wh.gone", b"")
        .file("b/.wh..wh..opq", b"")
        .file("b/new", b"2")
        .file(".wh.never", b"")
        .build();
    assert_eq!(layers(&[lower, upper]).names(), ["a", "a/keep", "b", "b/new"]);
}

#[test]
fn a_whiteout_of_nothing_or_of_the_parent_is_refused() {
    for name in [".wh.", ".wh..", "a/.wh..."] {
        let error = try_layers(&[LayerBuilder::new().file(name, b"").build()], 1 << 20);
        assert!(error.err().unwrap().to_string().contains("whiteout"), "{name}");
    }
}

#[test]
fn long_names_owners_and_attributes_come_from_extended_headers() {
    let long = format!("d/{}", "n".repeat(200));
    let layer = LayerBuilder::new()
        .pax(&[
            ("path", long.as_bytes()),
            ("uid", b"3000000"),
            ("mtime", b"1700000000.25"),
            ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
        ])
        .file("short", b"x")
        .file("next", b"y")
        .build();
    let applied = layers(&[layer]);
    assert_eq!(applied.names(), ["d", &long, "next"]);
    let meta = &applied.tree.lookup(long.as_bytes()).unwrap().meta;
    assert_eq!((meta.uid, meta.mtime), (3_000_000, 1_700_000_000));
    assert_eq!(meta.xattrs, [(b"security.capability".to_vec(), b"\x01\0\0\x02".to_vec())]);
    assert_eq!(applied.tree.lookup(b"next").unwrap().meta.uid, 0);
}

#[test]
fn entries_that_lead_out_of_the_root_are_refused_by_name() {
    let cases = [
        LayerBuilder::new().file("../escape", b"x"),
        LayerBuilder::new().file("a/../../escape", b"x"),
        LayerBuilder::new().link("a", EntryType::Link, "../../etc/shadow"),
        LayerBuilder::new().link("a", EntryType::Link, "nothing"),
        LayerBuilder::new().file("a", b"").file("a/b", b""),
        LayerBuilder::new().pax(&[("path", b"x/../../y")]).file("short", b""),
        LayerBuilder::new().pax(&[("GNU.sparse.major", b"1")]).file("s", b""),
        LayerBuilder::new().pax(&[("size", b"99999999999999")]).file("s", b""),
        LayerBuilder::new().add("s", EntryType::GNUSparse, 0o644, b""),
        LayerBuilder::new().add("s", EntryType::new(b'Z'), 0o644, b""),
    ];
    for (index, layer) in cases.into_iter().enumerate() {
        let error = try_layers(&[layer.build()], 1 << 20).err().unwrap();
        assert!(matches!(error, PackageError::Entry { .. }), "{index}: {error}");
    }
}

#[test]
fn an_absolute_name_and_a_link_to_the_host_stay_inside() {
    let applied = layers(&[LayerBuilder::new()
        .link("out", EntryType::Symlink, "/../../../etc")
        .file("/out/passwd", b"inside")
        .build()]);
    assert_eq!(applied.names(), ["etc", "etc/passwd", "out"]);
}

#[test]
fn more_content_than_allowed_is_refused_before_it_is_written() {
    let layer = LayerBuilder::new().file("a", &[1; 600]).file("b", &[1; 600]).build();
    let error = try_layers(&[layer], 1000).err().unwrap();
    assert!(matches!(error, PackageError::TooLarge { found: 1200, limit: 1000, .. }), "{error}");
}

#[test]
fn a_layer_cut_in_a_content_is_an_error() {
    let layer = LayerBuilder::new().file("a", &[1; 5000]).build();
    for end in [100, 512, 600, 3000, 5511] {
        let result = try_layers(&[layer[..end].to_vec()], 1 << 20);
        assert!(matches!(result, Err(PackageError::Damaged { .. })), "cut at {end}");
    }
}
