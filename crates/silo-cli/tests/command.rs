//! The command line: what it refuses and how it says so; image maps; certificates.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::silo::{Running, http, silo};
use std::{fs, path::Path, process::Command};

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn unknown_flags_and_commands_are_refused_with_the_nearest_and_exit_code_2() {
    silo(["serv"]).failed(2, "similar subcommand exists: 'serve'");
    silo(["check", "--block-sise", "4K", "x"]).failed(2, "'--block-size'");
    silo(["serve"]).failed(2, "--config");
    silo(["check", "x", "--block-size", "1X"]).failed(2, "is not a size; write 4096, 64K");
    assert!(silo(["--help"]).good().out.contains("Usage"));
}

#[test]
fn every_command_has_help_and_the_shells_have_completions() {
    let help = silo(["--help"]).good().out;
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert!(commands.len() >= 8, "{commands:?}");
    for command in commands {
        assert!(silo([command, "--help"]).good().out.contains("Usage"), "{command}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(silo(["completions", shell]).good().out.contains("serve"), "{shell}");
    }
}

#[test]
fn a_config_is_checked_without_touching_anything_and_errors_have_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("silo.toml");
    fs::write(
        &file,
        "[device.m]\nsize = \"1M\"\nsource = { file = { path = \"f\", create = true } }\n",
    )
    .unwrap();
    let said = silo(["--json", "config", "check", path(&file)]).good();
    assert_eq!(said.json()["devices"], serde_json::json!(["m"]));
    assert!(!dir.path().join("f").exists());

    fs::write(&file, "[device.m]\nsouce = \"memory\"\n").unwrap();
    let wanted = ":2:1: unknown key \"souce\"; did you mean \"source\"?";
    silo(["config", "check", path(&file)]).failed(2, wanted);
    silo(["serve", "--config", path(&file)]).failed(2, wanted);
    silo(["config", "check", "/nowhere/silo.toml"]).failed(2, "could not read /nowhere/silo.toml");
}

#[test]
fn a_map_of_an_image_names_zero_blocks_and_every_difference() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    // Ten blocks and a short one; zeros in the third.
    let mut content: Vec<u8> =
        (0..10 * 4096 + 77).map(|at| (at / 4096 + at % 7 + 1) as u8).collect();
    content[3 * 4096..4 * 4096].fill(0);
    fs::write(&one, &content).unwrap();
    let map = dir.path().join("map");
    let arguments = ["--json", "check", path(&one), "--block-size", "4K", "--map", path(&map)];
    let said = silo(arguments).good().json();
    assert_eq!(said["blocks"], 11);
    assert_eq!(said["zero_blocks"], 1);
    assert_eq!(said["blake3"], blake3::hash(&content).to_hex().as_str());
    let text = fs::read_to_string(&map).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 13);
    assert_eq!(lines[0], format!("silo-map 1 {} 4096", content.len()));
    assert_eq!(lines[1], blake3::hash(&content[..4096]).to_hex().as_str());
    assert_eq!(lines[4], "-");
    assert_eq!(lines[11], blake3::hash(&content[10 * 4096..]).to_hex().as_str());
    assert_eq!(lines[12], format!("root {}", blake3::hash(&content).to_hex()));

    for compare in [&map, &one] {
        silo(["check", path(&one), "--block-size", "4K", "--compare", path(compare)]).good();
    }
    for at in [0, 4096, 2 * 4096, 10 * 4096] {
        content[at] ^= 1;
    }
    content.truncate(10 * 4096 + 76);
    fs::write(&two, &content).unwrap();
    for compare in [&map, &one] {
        let compare = path(compare);
        let arguments = ["--json", "check", path(&two), "--block-size", "4K", "--compare", compare];
        let said = silo(arguments);
        assert_eq!(said.code, 3, "{said:?}");
        assert_eq!(said.json()["different"], serde_json::json!([[0, 2], [10, 10]]));
    }
    fs::write(&two, vec![0; 4096]).unwrap();
    let said = silo(["check", path(&one), "--block-size", "4K", "--compare", path(&two)]);
    assert!(said.code == 3 && said.out.contains("11 blocks differ: 0-10"), "{said:?}");

    silo(["check", path(&one), "--compare", path(&map)])
        .failed(1, "compare with --block-size 4096");
    fs::write(&map, "silo-map 1 99999999 4096\nzz\n").unwrap();
    let bad = ["check", path(&one), "--block-size", "4K", "--compare", path(&map)];
    silo(bad).failed(1, ":2: \"zz\" is not a hash");
    fs::write(&map, "silo-map 1 99999999999999 4096\n-\n").unwrap();
    silo(bad).failed(1, "the map ends too early");
    silo(["check", "/nowhere"]).failed(1, "could not open /nowhere");
}

#[test]
fn certificates_are_made_by_two_commands_and_openssl_agrees_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let tls = dir.path().join("tls");
    silo(["tls", "init", path(&tls)]).good();
    silo(["tls", "init", path(&tls)]).failed(1, "ca.crt");
    silo(["tls", "issue", path(&tls), "host-a"]).good();
    silo(["tls", "issue", path(&tls), "no/name"]).failed(2, "no/name");
    let verify = Command::new("openssl")
        .args(["verify", "-CAfile", path(&tls.join("ca.crt")), path(&tls.join("host-a.crt"))])
        .output()
        .unwrap();
    assert!(verify.status.success(), "{verify:?}");
}

#[test]
fn figures_are_served_as_the_documentation_lists_them() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("silo.toml"), dir.path().join("m.sock"));
    fs::write(
        &file,
        "[device.m]\nsize = \"1M\"\nsource = \"memory\"\nexpose = { nbd = { unix = \"m.sock\" } }\n\
         [metrics]\nlisten = \"127.0.0.1:0\"\n",
    )
    .unwrap();
    let running = Running::start(["serve", "--config", path(&file)]);
    let address = running.ready["metrics"].as_str().unwrap().to_owned();
    let (mut client, size) = common::Client::go(&socket).unwrap();
    assert_eq!(size, 1 << 20);
    assert_eq!(client.write(4096, &[7; 8192], 0).unwrap(), 0);
    assert_eq!(client.call(common::FLUSH, 0, 0, 0).unwrap(), 0);
    assert_eq!(client.read(4096, 4096).unwrap(), [7; 4096]);

    let (status, text) = http(&address, "GET", "/metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    for line in [
        "silo_device_size_bytes{device=\"m\"} 1048576.0",
        "silo_device_write_bytes_total{device=\"m\"} 8192",
        "silo_device_read_bytes_total{device=\"m\"} 4096",
        "silo_device_write_seconds_count{device=\"m\"} 1",
        "silo_device_flush_seconds_count{device=\"m\"} 1",
        "silo_device_errors_total{device=\"m\",operation=\"write\"} 0",
    ] {
        assert!(text.lines().any(|have| have == line), "{line} is not in\n{text}");
    }
    assert_eq!(exported(&text), documented());
    let shown = dashboard();
    assert!(shown.len() > 5, "{shown:?}");
    let have = exported(&text);
    for name in shown {
        let family = ["_total", "_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end))
            .unwrap_or(&name);
        assert!(
            have.iter().any(|(known, _)| known == family),
            "the dashboard asks for {name}, which is not exported"
        );
    }

    assert_eq!(http(&address, "GET", "/health").1, "ok\n");
    assert!(http(&address, "GET", "/else").0.contains("404"));
    assert!(http(&address, "POST", "/metrics").0.contains("405"));
    running.stop().good();
}

/// Names and kinds of the metrics in an exposition.
fn exported(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect()
}

/// Names and kinds of the metrics in the table of the documentation, in its order.
fn documented() -> Vec<(String, String)> {
    let text = include_str!("../../../docs/silo-metrics.md");
    text.lines()
        .filter_map(|line| line.strip_prefix("| `silo_"))
        .map(|line| {
            let mut cells = line.split('|').map(str::trim);
            let name = cells.next().unwrap().trim_end_matches('`');
            let kind = cells.next().unwrap();
            let name = if kind == "counter" { name.strip_suffix("_total").unwrap() } else { name };
            (format!("silo_{name}"), kind.to_owned())
        })
        .collect()
}

/// Names of the metrics that the dashboard asks for.
fn dashboard() -> Vec<String> {
    let text = include_str!("../../../deploy/grafana/silo.json");
    let json: serde_json::Value = serde_json::from_str(text).unwrap();
    let mut names = Vec::new();
    for panel in json["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let words = target["expr"].as_str().unwrap();
            let words = words.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            names.extend(words.filter(|word| word.starts_with("silo_")).map(str::to_owned));
        }
    }
    names
}
