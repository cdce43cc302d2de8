//! `silo` as a process, next to a real S3 server over TCP, with its credentials in the environment.

use super::{
    Client, FLUSH, LIMIT,
    silo::{Running, Said, command, http},
};
use silo_testing::S3Server;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

pub const MIB: usize = 1 << 20;
/// The folder in the bucket.
pub const FOLDER: &str = "backups/silo";
pub const LINE: &str = "acme/vm";

/// A server, keys, a folder for everything else.
pub struct Rig {
    pub server: S3Server,
    dir: tempfile::TempDir,
}

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rig = Self { server: S3Server::start(dir.path()).unwrap(), dir };
        rig.silo(&["keys", "create", &rig.path("keys")]).good();
        rig
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn path(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    pub fn secret(&self) -> &'static str {
        self.server.credentials()[1].1
    }

    /// A command that knows store, keys and credentials from its environment, and nothing else.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command(["--json"].iter().chain(arguments));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("AWS_") {
                command.env_remove(name);
            }
        }
        command
            .env("SILO_STORE", self.server.url(FOLDER))
            .env("SILO_KEY_FILE", self.path("keys"))
            .envs(self.server.credentials());
        command
    }

    /// Runs a command to its end. Whatever it says, it does not say the secret.
    pub fn silo(&self, arguments: &[&str]) -> Said {
        self.said(&mut self.command(arguments))
    }

    pub fn said(&self, command: &mut Command) -> Said {
        let said: Said = command.output().unwrap().into();
        self.check(&said);
        said
    }

    #[track_caller]
    pub fn check(&self, said: &Said) {
        for secret in [self.secret(), "not-the-secret"] {
            assert!(!said.out.contains(secret) && !said.err.contains(secret), "a secret: {said:?}");
        }
        assert!(!said.err.contains("panicked"), "{said:?}");
    }

    /// An image file of bytes that do not compress.
    pub fn image(&self, name: &str, seed: u64, bytes: usize) -> Vec<u8> {
        let mut content = vec![0; bytes];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut content);
        fs::write(self.at(name), &content).unwrap();
        content
    }

    /// Makes a generation of an image; what it said.
    pub fn back_up(&self, image: &str) -> serde_json::Value {
        let image = self.path(image);
        self.silo(&["sync", "--once", "--line", LINE, "--file", &image]).good().json()
    }

    pub fn restored(&self, line: &str, number: Option<u64>) -> Vec<u8> {
        let to = self.path("restored");
        let _ = fs::remove_file(&to);
        let number = number.map(|number| number.to_string());
        let mut arguments = vec!["restore", line, "--to", &to];
        if let Some(number) = &number {
            arguments.extend(["--generation", number]);
        }
        self.silo(&arguments).good();
        fs::read(to).unwrap()
    }

    /// The numbers of a line's generations, the newest first.
    pub fn numbers(&self, line: &str) -> Vec<u64> {
        let listed = self.silo(&["generations", line]).good().json();
        let numbers = listed["generations"].as_array().unwrap().iter();
        numbers.map(|one| one["number"].as_u64().unwrap()).collect()
    }

    /// Names of the objects under a folder of the store.
    pub fn objects(&self, folder: &str) -> Vec<String> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(dir).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let (root, mut found) = (self.server.file(FOLDER), Vec::new());
        walk(&root.join(folder), &mut found);
        let name = |path: &PathBuf| path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let mut names: Vec<String> = found.iter().map(name).collect();
        names.sort_unstable();
        names
    }

    /// Makes all objects under a folder an hour older, as time does.
    pub fn age(&self, folder: &str) {
        let then = std::time::SystemTime::now() - Duration::from_secs(3600);
        for name in self.objects(folder) {
            let file = fs::File::options().write(true).open(self.server.file(FOLDER).join(name));
            file.unwrap().set_modified(then).unwrap();
        }
    }

    /// Prunes to the newest generation of each line and collects; then there is nothing in the store
    /// that nobody needs.
    pub fn nothing_leaks(&self) {
        self.silo(&["prune", LINE, "--keep-last", "1", "--delete"]).good();
        self.age("");
        for _ in 0..2 {
            self.silo(&["collect", "--grace", "1s"]).good();
            // What was condemned is as old as the grace.
            self.age("collections");
        }
        let would = self.silo(&["collect", "--grace", "1s", "--dry-run"]).good().json();
        assert_eq!(would["condemned"], serde_json::Value::Null, "{would}");
        assert_eq!(would["leftovers"], serde_json::json!([]), "{would}");
        self.silo(&["verify", "--depth", "full"]).good();
        assert_eq!(self.objects("probe"), Vec::<String>::new());
    }
}

/// Waits until a figure that is scraped is at least this; gives all of them.
#[track_caller]
pub fn wait_for(address: &str, metric: &str, least: f64) -> String {
    let deadline = Instant::now() + LIMIT;
    loop {
        let (_, text) = http(address, "GET", "/metrics");
        if figure(&text, metric).is_some_and(|value| value >= least) {
            return text;
        }
        assert!(Instant::now() < deadline, "{metric} does not reach {least}:\n{text}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A figure of an exposition.
pub fn figure(text: &str, metric: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(metric)?.trim().parse().ok())
}

/// Bytes of a device that are written at once.
pub const STEP: usize = 64 << 10;

/// Writes turn after turn until the server goes: every step of the device gets the number of the
/// turn, in order. So at any moment the numbers never grow along the device and differ by one.
pub struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Load {
    pub fn start(socket: &Path, size: usize) -> Self {
        let (mut client, _) = Client::go(socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            for turn in (1..=250).cycle() {
                for at in (0..size).step_by(STEP) {
                    let ended = stopped.load(Ordering::Relaxed)
                        || client.write(at as u64, &vec![turn; STEP], 0).is_err();
                    if ended {
                        return;
                    }
                }
                if client.call(FLUSH, 0, 0, 0).is_err() {
                    return;
                }
            }
        });
        Self { stop, thread }
    }

    pub fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

/// The content is that of one moment of a [`Load`].
#[track_caller]
pub fn is_one_moment(content: &[u8]) {
    let turns: Vec<u8> = content.chunks(STEP).map(|step| step[0]).collect();
    let torn = content.chunks(STEP).position(|step| step.iter().any(|byte| *byte != step[0]));
    assert_eq!(torn, None, "a write is torn");
    let (first, last) = (turns[0], turns[turns.len() - 1]);
    let change = turns.iter().position(|turn| *turn != first).unwrap_or(turns.len());
    assert!(turns[change..].iter().all(|turn| *turn == last), "not one moment: {turns:?}");
    let before = if first == 1 { [250, 0] } else { [first.saturating_sub(1); 2] };
    assert!(first == last || before.contains(&last), "{turns:?}");
}

/// `silo serve` with a backup by config, or `silo sync` by flags: a process that uploads.
pub fn uploader(rig: &Rig, by_config: bool) -> Running {
    let _ = fs::remove_file(rig.at("sock"));
    if !by_config {
        let (image, socket) = (rig.path("image"), rig.path("sock"));
        return Running::of(&mut rig.command(&[
            "sync",
            "--line",
            LINE,
            "--file",
            &image,
            "--socket",
            &socket,
            "--max-age",
            "100ms",
            "--metrics",
            "127.0.0.1:0",
        ]));
    }
    let config = rig.path("serve.toml");
    let (bucket, endpoint) = (S3Server::BUCKET, rig.server.endpoint());
    let text = format!(
        "[device.disk]\nsource = {{ file = {{ path = \"image\" }} }}\n\
         expose = {{ nbd = {{ unix = \"sock\" }} }}\n\
         [backup]\ntenant = \"acme\"\nline = \"vm\"\nkeys = {{ file = \"keys\" }}\n\
         max-age = \"100ms\"\nscratch = \".\"\n[backup.store]\nurl = \"s3://{bucket}/{FOLDER}\"\n\
         endpoint = \"{endpoint}\"\nregion = \"us-east-1\"\naccess-key = {{ env = \"MY_ACCESS\" }}\n\
         secret-key = {{ file = \"secret\" }}\n[metrics]\nlisten = \"127.0.0.1:0\"\n"
    );
    fs::write(&config, text).unwrap();
    super::write_private(&rig.at("secret"), rig.secret());
    let [(access, value), (secret, _)] = rig.server.credentials();
    let mut command = rig.command(&["serve", "--config", &config]);
    command.env_remove(access).env_remove(secret).env_remove("SILO_STORE");
    Running::of(command.env("MY_ACCESS", value))
}
