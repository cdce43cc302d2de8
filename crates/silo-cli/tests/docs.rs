//! What the documentation shows is run as it stands there, in an empty folder: every command of
//! docs/silo-cli.md that needs one host, with what it says that they print, and the devices of the
//! example in docs/silo-config.md.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{
    Client, LIMIT,
    s3::wait_for,
    silo::{Running, command, silo},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use silo_testing::S3Server;
use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Instant,
};

const MIB: usize = 1 << 20;

fn noise(seed: u8, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut content);
    content
}

/// A command of a page, and the lines that it is said to print.
struct Shown {
    command: String,
    prints: Vec<String>,
}

fn shown(page: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        let Some(text) = line.strip_prefix("    ") else {
            inside = false;
            continue;
        };
        if let Some(command) = text.strip_prefix("$ ") {
            let command = command.split("  #").next().unwrap().trim().to_owned();
            all.push(Shown { command, prints: Vec::new() });
            inside = true;
        } else if text.starts_with("host-") {
            inside = false;
        } else if inside {
            all.last_mut().unwrap().prints.push(text.to_owned());
        }
    }
    all
}

/// The words of a line, every number and its unit as one sign.
fn shape(line: &str) -> Vec<String> {
    let is_unit = |word: &str| ["B", "KiB", "MiB", "GiB"].contains(&word);
    let words = line.split([' ', '(', ')', ',', ';', '"']).filter(|word| !word.is_empty());
    let words = words.filter(|word| !is_unit(word)).map(|word| {
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            "0".to_owned()
        } else {
            word.to_owned()
        }
    });
    words.collect()
}

/// Runs a command line as a shell does. One that stays is ended as soon as it says that it serves.
fn run(line: &str, dir: &Path, environment: &[(String, String)]) -> (i32, Vec<String>) {
    let mut shell = Command::new("sh");
    let path = Path::new(env!("CARGO_BIN_EXE_silo")).parent().unwrap().to_str().unwrap().to_owned();
    let path = format!("{path}:{}", std::env::var("PATH").unwrap());
    // The command itself gets the signal, and says how it ended.
    let exec = if line.contains("&&") { "" } else { "exec " };
    shell.arg("-c").arg(format!("{exec}{line}")).current_dir(dir).env("PATH", path);
    shell.envs(environment.iter().map(|(name, value)| (name, value)));
    // A group of its own: the signal is for all of it.
    let mut child = shell
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (sender, said) = mpsc::channel();
    let errors = sender.clone();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|l| errors.send(l)));
    let stdout = BufReader::new(child.stdout.take().unwrap());
    thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));
    let (mut lines, until) = (Vec::new(), Instant::now() + LIMIT);
    loop {
        match said.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(said) => {
                let stays = said.starts_with("serving ") || said.starts_with("mounted ");
                lines.push(said);
                if stays {
                    kill(Pid::from_raw(-(child.id() as i32)), Signal::SIGTERM).unwrap();
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let _ = kill(Pid::from_raw(-(child.id() as i32)), Signal::SIGKILL);
                panic!("{line} does not end: {lines:?}");
            }
        }
    }
    (child.wait().unwrap().code().unwrap_or(-1), lines)
}

#[test]
fn the_commands_of_the_page_about_the_command_do_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let server = S3Server::start(dir.path()).unwrap();
    for (seed, name) in ["debian.raw", "data.raw", "image.raw"].into_iter().enumerate() {
        fs::write(dir.path().join(name), noise(seed as u8, 2 * MIB)).unwrap();
    }
    let mut environment: Vec<(String, String)> =
        server.credentials().iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let shown = shown(include_str!("../../../docs/silo-cli.md"));
    assert!(shown.len() >= 20, "the page is read wrongly: {}", shown.len());
    let mut run_all = 0;
    for Shown { command, prints } in shown {
        // Takes an hour; it has tests of its own.
        if command.starts_with("silo bench") {
            continue;
        }
        let line = command
            .replace("s3://backups/", &format!("s3://{}/", S3Server::BUCKET))
            .replace("http://127.0.0.1:9000", &server.endpoint())
            .replace("/etc/bash_completion.d/", "");
        if let Some(exports) = line.strip_prefix("export ") {
            for export in exports.split(' ') {
                let (name, value) = export.split_once('=').unwrap();
                environment.push((name.to_owned(), value.trim_matches('\'').to_owned()));
            }
            continue;
        }
        let (code, said) = run(&line, dir.path(), &environment);
        assert_eq!(code, 0, "{line}: {said:?}");
        let shapes: Vec<_> = said.iter().map(|line| shape(line)).collect();
        for print in prints {
            assert!(shapes.contains(&shape(&print)), "{line} does not print {print}: {said:?}");
        }
        run_all += 1;
    }
    assert!(run_all >= 19, "{run_all}");
    let restored = fs::read(dir.path().join("back.raw")).unwrap();
    assert!(restored == fs::read(dir.path().join("data.raw")).unwrap());
}

#[test]
fn the_devices_of_the_example_of_a_config_are_served_and_backed_up() {
    let page = include_str!("../../../docs/silo-config.md");
    let example = page.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("silo.toml");
    fs::write(&file, example).unwrap();
    let file = file.to_str().unwrap().to_owned();
    silo(["config", "check", &file]).good();

    // The same, less what lies on other hosts, and with a store that is here.
    let server = S3Server::start(dir.path()).unwrap();
    let mut config: toml::Table = example.parse().unwrap();
    let devices = config["device"].as_table_mut().unwrap();
    for elsewhere in ["archive", "remote", "yesterday"] {
        devices.remove(elsewhere).unwrap();
    }
    let base = noise(1, 4 * MIB);
    for folder in ["disks", "images", "layers", "run", "mnt/data", "secrets"] {
        fs::create_dir_all(dir.path().join(folder)).unwrap();
    }
    fs::write(dir.path().join("images/debian.raw"), &base).unwrap();
    fs::write(dir.path().join("images/data.raw"), noise(2, 4 * MIB)).unwrap();
    devices["root"]["hash"] = blake3::hash(&base).to_hex().to_string().into();
    let nbd = devices["root"]["expose"]["nbd"].as_table_mut().unwrap();
    nbd["tcp"] = "127.0.0.1:0".into();
    config["migrate"]["listen"] = "127.0.0.1:0".into();
    config["metrics"]["listen"] = "127.0.0.1:0".into();
    let store = config["backup"]["store"].as_table_mut().unwrap();
    store["url"] = format!("s3://{}/vm", S3Server::BUCKET).into();
    store["endpoint"] = server.endpoint().into();
    fs::write(&file, config.to_string()).unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    silo(["keys", "create", &at("secrets/acme.keys")]).good();
    silo(["tls", "init", &at("tls")]).good();
    silo(["tls", "issue", &at("tls"), "host-a"]).good();

    let [(_, access), (_, secret)] = server.credentials();
    let mut serve = command(["--json", "serve", "--config", &file]);
    serve.env("SILO_ACCESS_KEY", access).env("SILO_SECRET_KEY", secret);
    let running = Running::of(&mut serve);
    let served: Vec<&str> = running.ready["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device["device"].as_str().unwrap())
        .collect();
    for name in ["root", "scratch", "data"] {
        assert!(served.contains(&name), "{name} is not served: {}", running.ready);
    }
    let (mut client, size) = Client::go(&dir.path().join("run/root.nbd")).unwrap();
    assert_eq!(size, base.len() as u64);
    assert!(client.read(0, MIB as u32).unwrap() == base[..MIB]);
    assert!(fs::read(dir.path().join("mnt/data/data")).unwrap() == noise(2, 4 * MIB));
    let metrics = running.ready["metrics"].as_str().unwrap();
    wait_for(metrics, "silo_backup_generations_total{line=\"acme/vm\"}", 1.0);
    drop(client);
    running.stop().good();
}

#[test]
fn every_command_that_answers_at_once_speaks_json_if_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(dir.path().join("image"), noise(3, MIB)).unwrap();
    fs::write(dir.path().join("c.toml"), "[device.m]\nsize = \"1M\"\nsource = \"memory\"\n")
        .unwrap();
    let (keys, store) = (at("keys"), format!("file://{}", at("store")));
    let lines: &[&[&str]] = &[
        &["keys", "create", &keys],
        &["keys", "list", &keys],
        &["hash", &at("image")],
        &["create", "--overlay", &at("disk"), "--base", &at("image")],
        &["inspect", &at("disk")],
        &["check", &at("image"), "--map", &at("map")],
        &["tls", "init", &at("tls")],
        &["tls", "issue", &at("tls"), "host-a"],
        &["config", "check", &at("c.toml")],
        &["config", "schema"],
        &["sync", "--once", "--line", "acme/vm", "--file", &at("image")],
        &["generations"],
        &["generations", "acme/vm"],
        &["generations", "acme/vm", "--show", "2"],
        &["restore", "acme/vm", "--to", &at("restored")],
        &["fork", "acme/vm", "acme/mine"],
        &["verify"],
        &["verify", "--depth", "full"],
        &["verify", "--depth", "scrub"],
        &["prune", "acme/vm", "--keep-last", "1"],
        &["collect", "--dry-run"],
        &["collect"],
        &["keys", "rotate", &keys, "--id", "2", "--tenant", "acme"],
        &["binlog", "create", &at("image"), &at("log")],
        &["binlog", "show", &at("log")],
        &["binlog", "replay", &at("log"), "--file", &at("replayed"), "--create", "--size", "1M"],
    ];
    for line in lines {
        let mut command = command(["--json"].iter().chain(*line));
        let output =
            command.env("SILO_STORE", &store).env("SILO_KEY_FILE", &keys).output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
        for text in out.lines() {
            // A schema is one object over many lines.
            if !line.starts_with(&["config", "schema"]) {
                let value: Result<serde_json::Value, _> = serde_json::from_str(text);
                assert!(value.is_ok_and(|value| value.is_object()), "{line:?}: {text}");
            }
        }
        let all: Vec<Result<serde_json::Value, _>> =
            serde_json::Deserializer::from_str(&out).into_iter().collect();
        assert!(!all.is_empty() && all.iter().all(Result::is_ok), "{line:?}: {out}");
        // No bar where nobody looks.
        assert!(output.stderr.is_empty(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
