//! Whole builds, of small inputs made here.

use super::layer::tests::LayerBuilder;
use super::recipe::{AddedFile, Directory, Mode, User};
use super::*;
use crate::package::{archive, manifest::Source};
use sha2::{Digest as _, Sha256};
use std::os::unix::fs::PermissionsExt as _;

struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    /// A kernel, modules, a guest program and a root directory; the same in every setup.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let setup = Self { dir };
        let virtio = [
            ("virtio_ring", "virtio"),
            ("virtio", ""),
            ("virtio_pci", "virtio_ring"),
            ("virtio_blk", "virtio_ring"),
            ("virtio_net", "virtio_ring,failover"),
            ("failover", ""),
            ("virtio_console", "virtio_ring"),
            ("virtio-rng", "virtio_ring"),
        ];
        modules::tests::modules_dir(&setup.path("modules/6.1.0-test"), &virtio);
        fs::write(setup.path("vmlinux"), kernel::tests::vmlinux()).unwrap();
        fs::write(setup.path("guest"), kernel::tests::elf((b"GNU", 1))).unwrap();
        setup.write("root/usr/bin/app", b"#!/bin/app\n", 0o755);
        setup.write("root/etc/app.conf", b"answer = 42\n", 0o640);
        std::os::unix::fs::symlink("usr/bin", setup.path("root/bin")).unwrap();
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8], mode: u32) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn recipe(&self, root: Root) -> Recipe {
        let mut recipe = Recipe::new("tiny", root);
        recipe.kernel =
            Kernel::Files { image: self.path("vmlinux"), modules: self.path("modules/6.1.0-test") };
        recipe.disk_mib = Some(32);
        recipe.entry.argv = Some(vec!["app".into()]);
        recipe
    }

    fn directory(&self) -> Recipe {
        self.recipe(Root::Directory { path: self.path("root") })
    }

    fn request(&self, recipe: Recipe) -> BuildRequest {
        BuildRequest {
            recipe,
            guest_program: self.path("guest"),
            cache: Cache::at(self.path("cache")),
            output: None,
        }
    }

    fn build(&self, recipe: Recipe) -> Result<Built> {
        build(&self.request(recipe), &mut |_| {})
    }
}

fn debugfs(package: &Package, request: &str) -> String {
    let output = std::process::Command::new("debugfs")
        .args(["-R", request])
        .arg(package.device("root").unwrap())
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_same_inputs_give_the_same_package_at_another_time_and_place() {
    let (one, two) = (Setup::new(), Setup::new());
    let first = one.build(one.directory()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let second = two.build(two.directory()).unwrap();
    assert_eq!((first.origin, second.origin), (Origin::Made, Origin::Made));
    assert_eq!(first.key, second.key);
    assert_eq!(first.package.manifest(), second.package.manifest());
    for (a, b) in first.package.manifest().files().iter().zip(second.package.manifest().files()) {
        let content = |package: &Package| fs::read(package.dir().join(&a.file)).unwrap();
        assert_eq!(a.file, b.file);
        assert!(content(&first.package) == content(&second.package), "{} differs", a.file);
    }
    first.package.verify(&Cache::at(one.path("cache"))).unwrap();
}

/// What the builder makes of the setup's inputs, independent of e2fsprogs. If this fails, the
/// builder makes other bytes than before of the same inputs: raise [`BUILDER`], so that no old
/// build is taken from a cache, and put the new hash here.
#[test]
fn builder_1_makes_these_bytes() {
    let setup = Setup::new();
    let mut recipe = setup.directory();
    recipe.users.push(User { name: "app".into(), uid: None, gid: None, home: "/data".into() });
    let mut store = layer::Store::new(setup.path(""), 1 << 20);
    let mut tree = tree::Tree::new();
    let cache = Cache::at(setup.path("cache"));
    root::fill(&mut tree, &recipe, &[], &cache, &mut store, &mut |_| {}).unwrap();
    let config = drafter_guest::config::MachineConfig::new(vec!["app".into()]);
    root::finish(&mut tree, &recipe, &setup.path("guest"), &config, &mut store).unwrap();
    let mut made = ext4::script_of(&tree, &setup.path("")).unwrap();
    for (_, number) in tree.names() {
        if let tree::Kind::File { blob, .. } = &tree.inode(number).kind {
            made.extend(fs::read(blob).unwrap());
        }
    }
    let modules = modules::ModuleSet::scan(&setup.path("modules/6.1.0-test")).unwrap();
    let modules = modules.ordered(&["virtio_net".to_owned()]).unwrap();
    made.extend(initramfs::make(b"guest", &modules));
    let place = setup.path("").display().to_string();
    let made = String::from_utf8_lossy(&made).replace(&place, "");
    assert_eq!(BUILDER, 1);
    assert_eq!(
        Blake3::of(made.as_bytes()).to_string(),
        "d0d75ec33d095d6b490024dcf8e37e411cfa9dedddb346ea1dcb9dc0ba494a36",
        "see the comment of this test; the script was\n{made}"
    );
}

#[test]
fn a_second_build_comes_from_the_cache_and_a_changed_input_does_not() {
    let setup = Setup::new();
    let first = setup.build(setup.directory()).unwrap();
    let again = setup.build(setup.directory()).unwrap();
    assert_eq!((again.origin, again.key), (Origin::Cache, first.key));
    type Change = (&'static str, fn(&Setup, &mut Recipe));
    let changes: &[Change] = &[
        ("content", |s, _| s.write("root/etc/app.conf", b"answer = 43\n", 0o640)),
        ("mode", |s, _| s.write("root/etc/app.conf", b"answer = 43\n", 0o600)),
        ("name", |s, _| s.write("root/etc/other.conf", b"", 0o600)),
        ("guest", |s, _| fs::write(s.path("guest"), kernel::tests::elf((b"GNU", 2))).unwrap()),
        ("modules", |s, _| s.write("modules/6.1.0-test/kernel/x.ko", b"", 0o644)),
        ("recipe", |_, recipe| recipe.memory_mib = 128),
    ];
    let mut keys = vec![first.key];
    for (what, change) in changes {
        let mut recipe = setup.directory();
        change(&setup, &mut recipe);
        let built = setup.build(recipe).unwrap();
        assert_eq!(built.origin, Origin::Made, "{what}");
        assert!(!keys.contains(&built.key), "{what}");
        keys.push(built.key);
    }
}

#[test]
fn a_damaged_build_in_the_cache_is_made_again() {
    let setup = Setup::new();
    let first = setup.build(setup.directory()).unwrap();
    let id = first.package.id();
    fs::write(first.package.initramfs(), vec![0; 5]).unwrap();
    let again = setup.build(setup.directory()).unwrap();
    assert_eq!((again.origin, again.package.id()), (Origin::Made, id));
    let kernel = fs::read(again.package.kernel()).unwrap();
    fs::write(again.package.kernel(), vec![0; kernel.len()]).unwrap();
    let again = setup.build(setup.directory()).unwrap();
    assert_eq!(again.origin, Origin::Made);
    again.package.verify(&Cache::at(setup.path("cache"))).unwrap();
}

#[test]
fn the_root_holds_its_source_the_guest_and_what_the_recipe_adds() {
    let setup = Setup::new();
    setup.write("added", b"added\n", 0o600);
    let mut recipe = setup.directory();
    recipe.users.push(User { name: "app".into(), uid: None, gid: None, home: "/data".into() });
    recipe.directories.push(Directory {
        path: "/data".into(),
        owner: "app".into(),
        mode: Mode(0o750),
    });
    recipe.files.push(AddedFile {
        from: setup.path("added"),
        to: "/bin/added".into(),
        owner: "app:root".into(),
        mode: Some(Mode(0o555)),
    });
    recipe.entry.user = Some("app".into());
    recipe.entry.env.insert("A".into(), "b".into());
    recipe.ports.push("http=80".parse().unwrap());
    let package = setup.build(recipe).unwrap().package;

    assert_eq!(debugfs(&package, "cat /etc/app.conf"), "answer = 42\n");
    assert_eq!(debugfs(&package, "cat /usr/bin/added"), "added\n");
    let stat = debugfs(&package, "stat /usr/bin/added");
    assert!(stat.contains("Mode:  0555") && stat.contains("User:   101   Group:     0"), "{stat}");
    let stat = debugfs(&package, "stat /data");
    assert!(stat.contains("Mode:  0750") && stat.contains("User:   101   Group:   101"), "{stat}");
    assert!(debugfs(&package, "cat /etc/passwd").contains("app:x:101:101:"));
    assert!(debugfs(&package, "stat /tmp").contains("Mode:  01777"));
    let guest = debugfs(&package, "stat /usr/lib/drafter/guest");
    assert!(guest.contains("Mode:  0755"), "{guest}");

    let manifest = package.manifest();
    let config = debugfs(&package, "cat /etc/drafter/machine.json");
    let config = drafter_guest::config::MachineConfig::from_json(config.as_bytes()).unwrap();
    assert_eq!(config, manifest.guest);
    assert_eq!((&*config.argv[0], &*config.user, &*config.env["A"]), ("app", "app", "b"));
    assert_eq!((&*manifest.kernel_release, manifest.ports[0].port), ("6.1.0-test", 80));
    assert_eq!(manifest.devices[0].bytes, 32 << 20);
    let initramfs = fs::read(package.initramfs()).unwrap();
    let order = b"virtio.ko\nvirtio_ring.ko\nvirtio_pci.ko\nvirtio_blk.ko\nfailover.ko\n\
                  virtio_net.ko\nvirtio_console.ko\nvirtio_rng.ko\n";
    assert!(initramfs.windows(order.len()).any(|window| window == order));
}

#[test]
fn a_build_goes_to_its_output_and_replaces_only_packages() {
    let setup = Setup::new();
    let mut request = setup.request(setup.directory());
    request.output = Some(setup.path("out/tiny.pkg"));
    let built = build(&request, &mut |_| {}).unwrap();
    assert!(built.package.dir().ends_with("out/tiny.pkg"));
    let kernel = built.package.kernel();
    let before = fs::metadata(&kernel).unwrap().modified().unwrap();
    // Up to date: not even copied.
    build(&request, &mut |_| {}).unwrap();
    assert_eq!(fs::metadata(&kernel).unwrap().modified().unwrap(), before);
    // Damaged: replaced.
    fs::write(&kernel, b"x").unwrap();
    build(&request, &mut |_| {}).unwrap().package.verify(&request.cache).unwrap();
    // Another package: replaced.
    request.recipe.name = "other".into();
    assert_eq!(build(&request, &mut |_| {}).unwrap().package.manifest().name, "other");
    // Something else: left alone.
    request.output = Some(setup.path("root"));
    let error = build(&request, &mut |_| {}).unwrap_err();
    assert!(matches!(error, PackageError::Foreign { .. }), "{error}");
    assert!(setup.path("root/usr/bin/app").exists());
    // An archive, which is the same package.
    request.output = Some(setup.path("out/other.tar.zst"));
    let id = build(&request, &mut |_| {}).unwrap().package.id();
    let unpacked =
        archive::unpack(&setup.path("out/other.tar.zst"), &setup.path("un"), 1 << 30).unwrap();
    assert_eq!(unpacked.id(), id);
}

#[test]
fn requests_that_cannot_work_are_refused_with_their_reason() {
    let setup = Setup::new();
    type Change = (fn(&Setup, &mut BuildRequest), &'static str);
    let changes: &[Change] = &[
        (|_, r| r.recipe.entry.argv = Some(vec!["nothing".into()]), "nothing"),
        (|_, r| r.recipe.entry.argv = Some(vec!["/etc/app.conf".into()]), "executable"),
        (|_, r| r.recipe.name = "a/b".into(), "plain name"),
        (|_, r| r.recipe.disk_mib = Some(1), "16 MiB"),
        (|_, r| r.recipe.memory_mib = 1, "32 MiB"),
        (|_, r| r.recipe.root = Root::Directory { path: "/nonexistent".into() }, "/nonexistent"),
        (|s, r| r.guest_program = s.path("vmlinuz"), "vmlinuz"),
        (|s, r| r.guest_program = s.path("root/etc/app.conf"), "ELF"),
        (|_, r| r.recipe.modules.push("absent".into()), "absent"),
        (
            |_, r| {
                let text = r#"{"path":"/d","owner":"nobody-here"}"#;
                r.recipe.directories.push(serde_json::from_str(text).unwrap());
            },
            "nobody-here",
        ),
    ];
    for (change, part) in changes {
        let mut request = setup.request(setup.directory());
        change(&setup, &mut request);
        let text = build(&request, &mut |_| {}).unwrap_err().to_string();
        assert!(text.contains(part), "{part}: {text}");
    }
    let builds = fs::read_dir(setup.path("cache/builds")).map_or(0, Iterator::count);
    assert_eq!(builds, 0, "a failed build is in the cache");
}

#[test]
fn debian_packages_are_merged_through_usr_without_what_no_guest_reads() {
    let setup = Setup::new();
    let data = LayerBuilder::new()
        .add("./bin/", tar::EntryType::Directory, 0o755, b"")
        .add("./bin/app", tar::EntryType::Regular, 0o755, b"app")
        .file("./usr/share/doc/app/changelog.gz", b"x")
        .file("./usr/share/doc/app/copyright", b"free")
        .file("./usr/share/man/man1/app.1.gz", b"x")
        .build();
    let file = deb::make(&data);
    let sha256 = debian::hex(&Sha256::digest(&file));
    setup.write(&format!("cache/debs/{sha256}.deb"), &file, 0o644);
    let deb = Deb {
        name: "app".into(),
        version: "1".into(),
        architecture: "all".into(),
        sha256,
        bytes: file.len() as u64,
    };
    let packages = vec!["app".to_owned()];
    let recipe = setup.recipe(Root::Debian { packages, exclude: Vec::new(), include: Vec::new() });
    let request = setup.request(recipe.clone());
    // apt is not asked: the answer is given.
    let inputs = Inputs {
        root: RootInput::Debs(vec![deb.clone()]),
        ..resolve(&setup.request(setup.directory()))
            .map(|inputs| Inputs { recipe: keyless(&recipe), request: &request, ..inputs })
            .unwrap()
    };
    fs::create_dir_all(setup.path("work")).unwrap();
    assemble::assemble(&inputs, &Blake3::of(b"key"), &setup.path("work"), &mut |_| {}).unwrap();
    let package = Package::open_dir(&setup.path("work")).unwrap();
    assert_eq!(debugfs(&package, "cat /usr/bin/app"), "app");
    assert!(debugfs(&package, "stat /bin").contains("Fast link dest: \"usr/bin\""));
    assert_eq!(debugfs(&package, "cat /usr/share/doc/app/copyright"), "free");
    assert_eq!(debugfs(&package, "ls -p /usr/share/doc/app").matches("changelog").count(), 0);
    assert!(!debugfs(&package, "ls -p /usr/share").contains("man"));
    let source = Source::Deb { name: "app".into(), version: "1".into(), sha256: deb.sha256 };
    assert!(package.manifest().sources.contains(&source));
}

/// An OCI image layout.
struct Oci<'a> {
    setup: &'a Setup,
    layers: Vec<serde_json::Value>,
    diff_ids: Vec<String>,
}

impl<'a> Oci<'a> {
    fn new(setup: &'a Setup) -> Self {
        setup.write("oci/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644);
        Self { setup, layers: Vec::new(), diff_ids: Vec::new() }
    }

    fn blob(&self, content: &[u8], media_type: &str) -> serde_json::Value {
        let hash = debian::hex(&Sha256::digest(content));
        self.setup.write(&format!("oci/blobs/sha256/{hash}"), content, 0o644);
        let digest = format!("sha256:{hash}");
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": content.len()})
    }

    fn layer(mut self, tar: &[u8], packed: &[u8], kind: &str) -> Self {
        self.diff_ids.push(format!("sha256:{}", debian::hex(&Sha256::digest(tar))));
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{kind}");
        self.layers.push(self.blob(packed, &media_type));
        self
    }

    fn finish(self, architecture: &str) -> Recipe {
        let config = serde_json::json!({
            "architecture": architecture, "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
            "config": {
                "Env": ["PATH=/opt:/usr/bin", "X=1"], "Entrypoint": ["app"], "Cmd": ["--serve"],
                "WorkingDir": "/opt", "User": "7:8", "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
            },
        });
        let config =
            self.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let manifest = serde_json::json!({
            "schemaVersion": 2, "config": config, "layers": self.layers,
        });
        let manifest = self
            .blob(manifest.to_string().as_bytes(), "application/vnd.oci.image.manifest.v1+json");
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
        self.setup.write("oci/index.json", index.to_string().as_bytes(), 0o644);
        let mut recipe =
            self.setup.recipe(Root::Oci { layout: self.setup.path("oci"), image: None });
        recipe.entry.argv = None;
        recipe
    }
}

fn gzip(data: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn image(setup: &Setup) -> Recipe {
    let lower = LayerBuilder::new()
        .add("opt/app", tar::EntryType::Regular, 0o755, b"old")
        .file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        .file("gone/file", b"x")
        .build();
    let middle = LayerBuilder::new()
        .add("opt/app", tar::EntryType::Regular, 0o755, b"new")
        .file(".wh.gone", b"")
        .build();
    let upper = LayerBuilder::new().file("etc/zstd", b"z").build();
    Oci::new(setup)
        .layer(&lower, &gzip(&lower), "+gzip")
        .layer(&middle, &middle, "")
        .layer(&upper, &zstd::encode_all(&*upper, 3).unwrap(), "+zstd")
        .finish("amd64")
}

#[test]
fn an_oci_image_becomes_a_package_that_runs_as_the_image_says() {
    let setup = Setup::new();
    let package = setup.build(image(&setup)).unwrap().package;
    assert_eq!(debugfs(&package, "cat /opt/app"), "new");
    assert_eq!(debugfs(&package, "cat /etc/zstd"), "z");
    assert!(!debugfs(&package, "ls -p /").contains("/gone/"));
    assert_eq!(debugfs(&package, "cat /etc/passwd"), "root:x:0:0::/root:/bin/sh\n");
    let manifest = package.manifest();
    let guest = &manifest.guest;
    assert_eq!(guest.argv, ["app", "--serve"]);
    assert_eq!((&*guest.working_dir, &*guest.user), ("/opt", "7:8"));
    assert_eq!(guest.env["X"], "1");
    let ports: Vec<u16> = manifest.ports.iter().map(|port| port.port).collect();
    assert_eq!(ports, [53, 80]);
    assert!(manifest.sources.iter().any(|source| matches!(source, Source::Oci { .. })));
}

#[test]
fn a_layer_that_is_not_the_one_that_was_named_is_refused() {
    let setup = Setup::new();
    let recipe = image(&setup);
    let layout: serde_json::Value =
        serde_json::from_slice(&fs::read(setup.path("oci/index.json")).unwrap()).unwrap();
    let blob = |digest: &serde_json::Value| {
        let hash = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
        setup.path("oci/blobs/sha256").join(hash)
    };
    let manifest = blob(&layout["manifests"][0]["digest"]);
    let text: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    // The uncompressed layer, so that the change does not show as a damaged stream.
    let layer = blob(&text["layers"][1]["digest"]);
    let good = fs::read(&layer).unwrap();
    let mut bad = good.clone();
    let at = bad.windows(3).position(|window| window == b"new").unwrap();
    bad[at] = b'X';
    fs::write(&layer, &bad).unwrap();
    let error = setup.build(recipe.clone()).unwrap_err();
    assert!(matches!(error, PackageError::Digest { .. }), "{error}");
    fs::write(&layer, &good[..good.len() - 512]).unwrap();
    let error = setup.build(recipe.clone()).unwrap_err();
    assert!(matches!(error, PackageError::Damaged { .. }), "{error}");
    fs::write(&layer, &good).unwrap();
    setup.build(recipe.clone()).unwrap();
    let mut bad = fs::read(&manifest).unwrap();
    bad.push(b' ');
    fs::write(&manifest, bad).unwrap();
    assert!(setup.build(recipe).is_err());
}

#[test]
fn a_layer_whose_content_is_not_the_one_of_the_configuration_is_refused() {
    let setup = Setup::new();
    let layer = LayerBuilder::new().file("a", b"").build();
    let recipe = Oci::new(&setup).layer(b"another", &gzip(&layer), "+gzip").finish("amd64");
    let error = setup.build(recipe).unwrap_err();
    assert!(matches!(error, PackageError::Digest { .. }), "{error}");
}

#[test]
fn images_for_other_machines_and_hostile_layouts_are_refused() {
    let setup = Setup::new();
    let recipe = Oci::new(&setup).finish("arm64");
    let text = setup.build(recipe.clone()).unwrap_err().to_string();
    assert!(text.contains("linux/arm64") && text.contains("linux/amd64"), "{text}");
    for (index, part) in [
        (r#"{"manifests":[]}"#, "no image"),
        (r#"{"manifests":[{"digest":"sha256:../../etc/passwd","size":1}]}"#, "64 hex digits"),
        (r#"{"manifests":[{"digest":"md5:00","size":1}]}"#, "only sha256"),
        (r#"{"manifests":[{"digest":"a","size":1},{"digest":"b","size":1}]}"#, "a, b"),
        ("[", "cannot be read"),
        ("{}", "not an image"),
    ] {
        fs::write(setup.path("oci/index.json"), index).unwrap();
        let text = setup.build(recipe.clone()).unwrap_err().to_string();
        assert!(text.contains(part), "{index}: {text}");
    }
    fs::remove_file(setup.path("oci/oci-layout")).unwrap();
    let text = setup.build(recipe).unwrap_err().to_string();
    assert!(text.contains("no OCI image layout"), "{text}");
}

#[test]
fn a_recipe_file_is_read_with_its_paths_beside_it() {
    let setup = Setup::new();
    setup.write(
        "recipes/a.json",
        br#"{"recipe":1,"name":"a","root":{"directory":{"path":"../root"}},
            "files":[{"from":"x","to":"/x","mode":"0755"}]}"#,
        0o644,
    );
    let recipe = Recipe::read(&setup.path("recipes/a.json")).unwrap();
    assert_eq!(recipe.root, Root::Directory { path: setup.path("recipes/../root") });
    assert_eq!(recipe.files[0].from, setup.path("recipes/x"));
    assert_eq!(recipe.files[0].mode, Some(Mode(0o755)));
    for (text, part) in [
        (r#"{"recipe":2,"name":"a"}"#, "version 2"),
        (r#"{"name":"a"}"#, "does not say"),
        (r#"{"recipe":1,"name":"a","root":{"debian":{"packages":["b"]}},"colour":1}"#, "colour"),
        (r#"{"recipe":1,"name":"a","root":{"tape":{}}}"#, "tape"),
        ("{", "not JSON"),
    ] {
        setup.write("recipes/b.json", text.as_bytes(), 0o644);
        let error = Recipe::read(&setup.path("recipes/b.json")).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("b.json"), "{error}");
    }
}
