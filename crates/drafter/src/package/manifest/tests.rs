use super::*;
use serde_json::{Value, json};

/// A manifest that is valid; files are as [`crate::package::tests`] makes them.
pub(crate) fn sample() -> Manifest {
    let entry = |file: &str, content: &[u8]| FileEntry {
        file: file.into(),
        bytes: content.len() as u64,
        blake3: Blake3::of(content),
    };
    Manifest {
        format: FORMAT.into(),
        version: FORMAT_VERSION,
        name: "sample".into(),
        created_by: "drafter 0.1.0".into(),
        machine_type: "microvm".into(),
        cpu: CpuNeeds { architecture: "x86_64".into(), features: vec![] },
        memory_bytes: 256 << 20,
        vcpus: 1,
        kernel_release: "6.1.0".into(),
        command_line: "quiet".into(),
        guest: MachineConfig::new(vec!["/bin/true".into()]),
        ports: vec!["redis=6379".parse().unwrap()],
        devices: vec![Device {
            name: "root".into(),
            file: "root.ext4".into(),
            bytes: 8192,
            blake3: Blake3::of(&[0; 8192]),
        }],
        kernel: entry("kernel", b"kernel"),
        initramfs: entry("initramfs.cpio", b"initramfs"),
        sources: vec![
            Source::Deb { name: "a".into(), version: "1".into(), sha256: "00".repeat(32) },
            Source::Oci { digest: "sha256:0".into() },
            Source::Files { name: "root".into(), blake3: Blake3::of(b"") },
        ],
    }
}

fn read(value: &Value) -> Result<(Manifest, PackageId)> {
    Manifest::from_json(value.to_string().as_bytes(), Path::new("x.pkg"))
}

fn changed(change: impl FnOnce(&mut Value)) -> String {
    let mut value = serde_json::to_value(sample()).unwrap();
    change(&mut value);
    read(&value).unwrap_err().to_string()
}

const GOLDEN: &str = r#"{
  "format": "drafter-package",
  "version": 1,
  "name": "sample",
  "created_by": "drafter 0.1.0",
  "machine_type": "microvm",
  "cpu": {
    "architecture": "x86_64",
    "features": []
  },
  "memory_bytes": 268435456,
  "vcpus": 1,
  "kernel_release": "6.1.0",
  "command_line": "quiet",
  "guest": {
    "version": "1.0",
    "argv": [
      "/bin/true"
    ],
    "env": {},
    "working_dir": "/",
    "user": "",
    "restart": {
      "policy": "on-failure",
      "backoff_first_ms": 500,
      "backoff_max_ms": 30000,
      "backoff_reset_ms": 60000
    },
    "at_end": "power-off",
    "stop_timeout_ms": 10000,
    "hooks": {},
    "probes": {}
  },
  "ports": [
    {
      "name": "redis",
      "protocol": "tcp",
      "port": 6379
    }
  ],
  "devices": [
    {
      "name": "root",
      "file": "root.ext4",
      "bytes": 8192,
      "blake3": "75fa6091f28c9dd09a0b0d4d3637f82d43a08d6d6ef2cc5fc93eeb33c6adc2de"
    }
  ],
  "kernel": {
    "file": "kernel",
    "bytes": 6,
    "blake3": "KERNEL"
  },
"#;

#[test]
fn the_manifest_reads_and_writes_as_the_golden_text() {
    let text = sample().to_json();
    let kernel = Blake3::of(b"kernel").to_string();
    let root = Blake3::of(&[0; 8192]).to_string();
    let golden = GOLDEN
        .replace("KERNEL", &kernel)
        .replace("75fa6091f28c9dd09a0b0d4d3637f82d43a08d6d6ef2cc5fc93eeb33c6adc2de", &root);
    assert!(text.starts_with(&golden), "{text}");
    let (manifest, id) = Manifest::from_json(text.as_bytes(), Path::new("x")).unwrap();
    assert_eq!(manifest, sample());
    assert_eq!(id, sample().id());
}

#[test]
fn the_identity_is_the_hash_of_the_canonical_text() {
    let value = json!({"b": [1, {"z": "ü\n", "a": null}], "a": true});
    let mut text = String::new();
    canonical(&value, &mut text);
    assert_eq!(text, r#"{"a":true,"b":[1,{"a":null,"z":"ü\n"}]}"#);
    assert_eq!(identity(&value), PackageId(Blake3::of(text.as_bytes())));
}

#[test]
fn the_identity_ignores_white_space_and_order_and_nothing_else() {
    let id = sample().id();
    let compact = serde_json::to_vec(&sample()).unwrap();
    assert_eq!(Manifest::from_json(&compact, Path::new("x")).unwrap().1, id);
    let mut other = sample();
    other.kernel.blake3 = Blake3::of(b"other");
    assert_ne!(other.id(), id);
    let mut other = sample();
    other.guest.env.insert("A".into(), "b".into());
    assert_ne!(other.id(), id);
}

#[test]
fn foreign_newer_and_broken_manifests_are_told_apart() {
    for text in ["", "[1", "hello", "{}", r#"{"format":"tar"}"#, "[]", "null"] {
        let error = Manifest::from_json(text.as_bytes(), Path::new("x")).unwrap_err();
        assert!(matches!(error, PackageError::Foreign { .. }), "{text}: {error}");
    }
    let newer = json!({"format": FORMAT, "version": 2, "parts": []});
    let text = read(&newer).unwrap_err().to_string();
    assert!(text.contains("version 2") && text.contains("up to 1"), "{text}");
    assert!(changed(|m| m["version"] = json!("1")).contains("version is not a number"));
    assert!(changed(|m| drop(m.as_object_mut().unwrap().remove("kernel"))).contains("kernel"));
    assert!(changed(|m| m["colour"] = json!("green")).contains("colour"));
}

#[test]
fn every_broken_rule_is_named_by_its_field() {
    type Break = (fn(&mut Value), &'static str);
    let breaks: &[Break] = &[
        (|m| m["name"] = json!("../x"), "name"),
        (|m| m["memory_bytes"] = json!(1000), "memory_bytes"),
        (|m| m["vcpus"] = json!(0), "vcpus"),
        (|m| m["command_line"] = json!("a\nb"), "command_line"),
        (|m| m["guest"]["working_dir"] = json!("x"), "working_dir"),
        (|m| m["ports"][0]["port"] = json!(0), "ports"),
        (|m| m["devices"] = json!([]), "devices"),
        (|m| m["devices"][0]["bytes"] = json!(100), "devices.bytes"),
        (|m| m["devices"][0]["file"] = json!("/etc/passwd"), "file"),
        (|m| m["devices"][0]["file"] = json!("kernel"), "all different"),
        (|m| m["kernel"]["file"] = json!("../kernel"), "file"),
        (|m| m["kernel"]["file"] = json!("manifest.json"), "all different"),
        (|m| m["kernel"]["blake3"] = json!("00"), "64 lower-case"),
        (|m| m["initramfs"]["file"] = json!(".hidden"), "file"),
    ];
    for (change, part) in breaks {
        let text = changed(*change);
        assert!(text.contains(part) && text.contains("x.pkg"), "{part}: {text}");
    }
}

#[test]
fn ports_are_read_as_people_write_them() {
    let port: Port = "redis=6379/tcp".parse().unwrap();
    assert_eq!((&*port.name, port.protocol, port.port), ("redis", conduit::Protocol::Tcp, 6379));
    let port: Port = "53/udp".parse().unwrap();
    assert_eq!((&*port.name, port.protocol, port.port), ("53-udp", conduit::Protocol::Udp, 53));
    for text in ["", "0", "70000", "80/sctp", "a=b", "=/"] {
        assert!(text.parse::<Port>().is_err(), "{text}");
    }
}
