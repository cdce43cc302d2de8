use super::*;

const PATH: &str = "silo.toml";

fn error(text: &str) -> String {
    match Config::parse(text, Path::new(PATH)) {
        Ok(config) => panic!("taken: {config:?}"),
        Err(error) => error.to_string(),
    }
}

fn parsed(text: &str) -> Config {
    Config::parse(text, Path::new(PATH)).unwrap_or_else(|error| panic!("{error}"))
}

const MEMORY: &str = "[device.m]\nsize = \"1M\"\nsource = \"memory\"\n";

#[test]
fn an_empty_file_and_the_smallest_device_are_taken() {
    assert!(parsed("").device.is_empty());
    let config = parsed(MEMORY);
    assert_eq!(config.device["m"].size, Some(ByteSize(1 << 20)));
    assert_eq!(config.device["m"].block_size, ByteSize(4096));
    assert_eq!(config.members(None), Some(("all".to_owned(), vec!["m".to_owned()])));
}

#[test]
fn unknown_keys_are_errors_with_their_place_and_the_name_that_was_meant() {
    let text = format!("{MEMORY}block_size = \"64K\"\n");
    assert_eq!(
        error(&text),
        "silo.toml:4:1: unknown key \"block_size\"; did you mean \"block-size\"?\n     \
         4 | block_size = \"64K\"\n       | ^"
    );
    let text = "[device.m]\nsize = 1\nsource = { fil = { path = \"x\" } }\n";
    assert!(
        error(text).starts_with("silo.toml:3:12: unknown choice \"fil\"; did you mean \"file\"?")
    );
    let text = "[metrics]\nlisten = \"127.0.0.1:1\"\nzzz = 1\n";
    assert!(error(text).starts_with("silo.toml:3:1: unknown key \"zzz\"; there are listen"));
    let text = "[device.m]\nsource = { disk = { dir = \"d\", bace = \"b\" } }\n";
    assert!(error(text).contains("did you mean \"base\"?"), "{}", error(text));
}

#[test]
fn wrong_values_say_what_is_wanted() {
    for (text, wanted) in [
        ("[device.m]\nsize = \"1X\"\nsource = \"memory\"", "2:8: \"1X\" is not a size; write"),
        ("[device.m]\nsize = -1\nsource = \"memory\"", "is not a size: it is negative"),
        ("[device.m]\nsize = 1.5\nsource = \"memory\"", "expected a size, as in"),
        ("[device.m]\nsize = 1", "missing field `source`"),
        ("[metrics]\nlisten = \"nowhere\"", "invalid socket address"),
        ("[device.m\n", "1:10: "),
        ("[device.m]\n[device.m]\n", "duplicate key"),
    ] {
        let error = error(text);
        assert!(error.contains(wanted), "{text}\n{error}");
    }
    let text = "[backup]\ntenant = \"t\"\nkeys = { env = \"K\" }\nmax-age = 30\n\
                store = { url = \"file:///b\" }";
    assert!(error(text).contains("4:11: ") && error(text).contains("with its unit"));
}

#[test]
fn secrets_in_the_file_are_refused_and_never_shown() {
    let head = "[backup]\ntenant = \"t\"\nstore = { url = \"file:///b\" }\n";
    let text = format!("{head}keys = \"hunter2\"\n");
    let message = error(&text);
    assert!(message.starts_with("silo.toml:4:8: a secret does not belong in this file"));
    assert!(message.contains("{ env = \"NAME\" }") && !message.contains("hunter2"), "{message}");

    let text = "[backup]\ntenant = \"t\"\nkeys = { env = \"K\" }\n\
                store = { url = \"s3://key:hunter2@bucket/x\" }\n";
    let message = error(text);
    assert!(message.starts_with("silo.toml:4:"), "{message}");
    assert!(message.contains("credentials do not belong in an address"), "{message}");
    assert!(!message.contains("hunter2"), "{message}");

    let both = format!("{head}keys = {{ env = \"A\", file = \"b\" }}\n");
    assert!(error(&both).contains("env or file, not both"));
    let text = format!("{head}keys = {{ enw = \"A\" }}\n");
    assert!(error(&text).contains("did you mean \"env\"?"));

    // At a key that is misspelt, in a table of its own, and in an address.
    for wrong in [
        "[backup]\nsecret_key = \"hunter2\"\n",
        "[backup.store]\nurl = \"file:///b\"\nsecret_key = \"hunter2\"\n",
        "[backup.keys]\nvalue = \"hunter2\"\n",
        "[backup]\nkeys = hunter2\n",
        "[backup]\ntenant = \"t\"\nkeys = { env = \"K\" }\n\
         store = { url = \"s3://b\", endpoint = \"http://me:hunter2@host\" }\n",
        "[device.a]\nsource = { silo = { url = \"nbd://me:hunter2@host/x\" } }\n",
    ] {
        let message = error(wrong);
        assert!(!message.contains("hunter2"), "{message}");
    }
}

#[test]
fn devices_that_outlive_the_process_do_not_move_without_a_note() {
    let text = |source: &str, note: &str| {
        format!("[device.a]\nsize = \"1M\"\nsource = {source}\n[migrate]\nplaintext = true\n{note}")
    };
    let file = "{ file = { path = \"x\" } }";
    let message = error(&text(file, ""));
    assert!(message.contains("migrate.note: is missing"), "{message}");
    parsed(&text(file, "note = \"n\"\n"));
    parsed(&text("\"memory\"", ""));
    let own = |source: &str| parsed(&text(source, "note = \"n\"\n")).device["a"].own_note();
    assert_eq!(own(file), Some("x.silo-note".into()));
    assert_eq!(own("{ directory = { path = \"d/\" } }"), Some("d.silo-note".into()));
    assert_eq!(own("{ file = { path = \"/dev/sdb\" } }"), None);
}

#[test]
fn one_file_under_two_spellings_is_one_file() {
    let text = "[device.a]\nsource = { file = { path = \"x\" } }\n\
                [device.b]\nsource = { file = { path = \"./x\" } }\n";
    assert!(error(text).contains("x is used by \"a\" too"));
}

#[test]
fn all_that_cannot_work_is_told_at_once_in_the_order_of_the_file() {
    let text = r#"
[device.Root]
block-size = 1000
source = "memory"

[device.data]
source = { file = { path = "x" } }
expose = { nbd = { tcp = "0.0.0.0:10809" }, vhost-user-blk = { socket = "s", queues = 0 } }

[device.more]
source = { file = { path = "x" } }

[group.vm]
devices = ["dat", "more"]

[group.other]
devices = ["more"]

[migrate]
in-flight = "1K"
"#;
    let message = error(text);
    let lines: Vec<&str> = message.lines().collect();
    let wanted = [
        "silo.toml:2:9: device.Root: a device's name",
        "silo.toml:2:9: device.Root.size: is missing",
        "silo.toml:3:1: device.Root.block-size: must be a power of two",
        "silo.toml:8:12: device.data.expose.nbd.tcp: needs TLS",
        "silo.toml:8:45: device.data.expose.vhost-user-blk.queues: must be from 1 to 64",
        "silo.toml:11:1: device.more.source: x is used by \"data\" too",
        "silo.toml:14:1: group.vm.devices: there is no device \"dat\"; did you mean \"data\"?",
        "silo.toml:14:1: group.vm.devices: \"more\" is in group \"other\" already",
        "silo.toml:19:2: migrate.group: is missing: there are several groups",
        "silo.toml:19:2: migrate.plaintext: moving needs TLS",
        "silo.toml:19:2: migrate.peer-name: is missing: which host may devices go to or come from?",
        "silo.toml:20:1: migrate.in-flight: must be at least 1M",
    ];
    for wanted in wanted {
        let key = wanted.split(": ").nth(1).unwrap();
        assert!(
            lines
                .iter()
                .any(|line| line.contains(key) && line.contains(&wanted[wanted.len() - 12..])),
            "{wanted}\nis not in\n{message}"
        );
    }
    assert_eq!(lines.len(), wanted.len(), "{message}");
    let places: Vec<usize> =
        lines.iter().map(|line| line.split(':').nth(1).unwrap().parse().unwrap()).collect();
    assert!(places.is_sorted(), "{message}");
}

#[test]
fn relative_paths_count_from_the_folder_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(PATH);
    std::fs::write(
        &path,
        "[device.m]\nsource = { disk = { dir = \"d\", base = \"/abs\" } }\noverlays = [\"o\"]\n\
         expose = { nbd = { unix = \"s\" } }\n[backup]\ntenant = \"t\"\nkeys = { file = \"k\" }\n\
         store = { url = \"file:///b\" }\n",
    )
    .unwrap();
    let config = Config::load(&path).unwrap();
    let device = &config.device["m"];
    let SourceConfig::Disk { dir: disk, base, .. } = &device.source else { panic!() };
    assert_eq!(disk, &dir.path().join("d"));
    assert_eq!(base.as_deref(), Some(Path::new("/abs")));
    assert_eq!(device.overlays, [dir.path().join("o")]);
    assert_eq!(device.expose.nbd.as_ref().unwrap().unix, Some(dir.path().join("s")));
    assert_eq!(config.backup.unwrap().keys, Secret::File(dir.path().join("k")));
}

const DOCUMENT: &str = include_str!("../../../../docs/silo-config.md");

#[test]
fn the_example_of_the_documentation_is_taken_and_shows_every_section_and_source() {
    let (_, rest) = DOCUMENT.split_once("```toml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let config = parsed(example);
    assert!(config.identity.is_some() && config.backup.is_some() && config.migrate.is_some());
    assert_eq!(config.device["archive"].block_size, ByteSize(64 << 10));
    // Each key that a file may have, except the rarely useful ones.
    let schema = serde_json::to_value(Config::schema()).unwrap();
    let mut keys = Vec::new();
    collect_keys(&schema, &mut keys);
    assert!(keys.len() > 50, "{keys:?}");
    let rare =
        ["plaintext", "device", "attach", "ublk", "recover", "process", "pid", "mapping", "delay"];
    for key in keys.iter().filter(|key| !rare.contains(&key.as_str())) {
        assert!(example.contains(key.as_str()), "the example does not show {key}");
    }
}

fn collect_keys(schema: &serde_json::Value, keys: &mut Vec<String>) {
    match schema {
        serde_json::Value::Object(map) => {
            if let Some(serde_json::Value::Object(properties)) = map.get("properties") {
                keys.extend(properties.keys().cloned());
            }
            map.values().for_each(|value| collect_keys(value, keys));
        }
        serde_json::Value::Array(list) => list.iter().for_each(|value| collect_keys(value, keys)),
        _ => {}
    }
}

#[test]
fn the_schema_beside_the_documentation_is_that_of_the_types() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/silo-config.schema.json");
    let have = std::fs::read_to_string(path).unwrap_or_default();
    let want = serde_json::to_string_pretty(&Config::schema()).unwrap() + "\n";
    assert!(have == want, "write it again: silo config schema > docs/silo-config.schema.json");
}
