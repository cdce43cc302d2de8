//! Debian packages: which ones a request needs, and their files.
//!
//! apt answers both questions as for an empty system, with caches and lock files of its own, so the
//! host's package state is neither read nor touched; only the host's sources and package lists
//! count. What a guest does not need (its init is drafter's, nothing is ever installed into it) is
//! cut out of the graph, with everything that only it needs.

use super::tool::Tool;
use crate::package::{
    cache::Cache,
    error::{Attempt, PackageError, Result},
    files,
    manifest::Blake3,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// What a guest does not need although packages depend on it: they are for installing, for another
/// init, or for people at a console.
pub const DEFAULT_EXCLUDE: &[&str] = &[
    "adduser",
    "cdebconf",
    "debconf",
    "dpkg",
    "gcc-12-base",
    "init-system-helpers",
    "install-info",
    "libpam-runtime",
    "lsb-base",
    "passwd",
    "perl",
    "perl-base",
    "runit-helper",
    "systemd",
    "systemd-sysv",
    "sysvinit-utils",
    "tar",
    "ucf",
    "usrmerge",
    "usr-is-merged",
];

const HINT: &str = "see that the sources in /etc/apt are reachable, run `apt-get update`, and build \
                    again";
const SOLVE_LIMIT: Duration = Duration::from_secs(120);
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(900);

/// A Debian package by its content.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Deb {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
    pub(crate) sha256: String,
    pub(crate) bytes: u64,
}

impl Deb {
    pub(crate) fn path(&self, cache: &Cache) -> Result<PathBuf> {
        Ok(cache.dir("debs")?.join(format!("{}.deb", self.sha256)))
    }
}

/// A package as apt's lists describe it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Stanza {
    deb: Option<Deb>,
    /// Each dependency as its alternatives, without versions.
    depends: Vec<Vec<String>>,
    provides: Vec<String>,
}

/// apt with caches of its own.
pub(crate) struct Apt<'a> {
    cache: &'a Cache,
    dir: PathBuf,
}

impl<'a> Apt<'a> {
    pub(crate) fn new(cache: &'a Cache) -> Result<Self> {
        let dir = cache.dir("apt")?;
        files::make_dir(&dir.join("archives/partial"))?;
        let status = dir.join("status");
        if !status.exists() {
            files::write_atomically(&status, b"")?;
        }
        Ok(Self { cache, dir })
    }

    /// What to install for `wanted` without what `exclude` names, sorted by name. The answer is
    /// remembered until the host's package lists change.
    pub(crate) fn closure(&self, wanted: &[String], exclude: &[String]) -> Result<Vec<Deb>> {
        wanted.iter().try_for_each(|name| check_name(name))?;
        self.remembered("closure", &[wanted, exclude], || {
            let operation = format!("asking apt what {} needs", wanted.join(" "));
            let mut command = self.command("apt-get");
            command
                .args(["install", "--print-uris", "-qq", "-y", "--no-install-recommends", "--"])
                .args(wanted);
            let solution =
                String::from_utf8_lossy(&self.run(operation, &mut command)?).into_owned();
            let solution = parse_uris(&solution);
            let stanzas =
                self.show(solution.iter().map(|(name, version)| format!("{name}={version}")))?;
            let roots: Vec<String> = wanted
                .iter()
                .map(|name| name.split('=').next().unwrap_or(name).to_owned())
                .collect();
            prune(&stanzas, &roots, exclude)
        })
    }

    /// The package that `name` stands for: itself if it holds a kernel, else what it depends on.
    pub(crate) fn kernel(&self, name: &str) -> Result<Deb> {
        check_name(name)?;
        let wrong = |problem: String| PackageError::Input {
            input: format!("kernel package {name}"),
            problem,
        };
        let found = self.remembered("kernel", &[&[name.to_owned()]], || {
            let stanza = self.show_one(name)?;
            let concrete = stanza.depends.iter().flatten().find(|need| {
                need.strip_prefix("linux-image-")
                    .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            });
            let stanza = match concrete {
                Some(need) => self.show_one(need)?,
                None => stanza,
            };
            Ok(stanza.deb.into_iter().collect())
        })?;
        found.into_iter().next().ok_or_else(|| {
            wrong("is a virtual package; name one such as linux-image-cloud-amd64".to_owned())
        })
    }

    /// Sees to it that the files of all packages are in the cache, with their right content. `progress` gets the number of
    /// files and bytes that are missing, before they are fetched.
    pub(crate) fn download(
        &self,
        debs: &[Deb],
        progress: &mut dyn FnMut(usize, u64),
    ) -> Result<()> {
        let mut missing = Vec::new();
        for deb in debs {
            let path = deb.path(self.cache)?;
            // What has lain on a disk may have changed there.
            if path.exists() && sha256_file(&path)? != deb.sha256 {
                fs::remove_file(&path).attempt(|| format!("removing {}", path.display()))?;
            }
            if !path.exists() {
                missing.push(deb);
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        progress(missing.len(), missing.iter().map(|deb| deb.bytes).sum());
        let scratch = self.cache.scratch()?;
        let operation = format!("downloading {} Debian packages", missing.len());
        let mut command = self.command("apt-get");
        command
            .current_dir(scratch.path())
            .args(["download", "-qq", "--"])
            .args(missing.iter().map(|d| format!("{}:{}={}", d.name, architecture(d), d.version)));
        Tool { operation, package: "apt", hint: HINT, limit: DOWNLOAD_LIMIT }.run(&mut command)?;
        let mut found = BTreeMap::new();
        let attempt = || format!("reading directory {}", scratch.path().display());
        for entry in fs::read_dir(scratch.path()).attempt(attempt)? {
            let path = entry.attempt(attempt)?.path();
            found.insert(sha256_file(&path)?, path);
        }
        for deb in missing {
            // By content: whatever apt calls the file, it is the one that the lists name.
            let path = found.get(&deb.sha256).ok_or_else(|| PackageError::Input {
                input: format!("Debian package {} {}", deb.name, deb.version),
                problem: format!("no downloaded file has its SHA-256 {}; {HINT}", deb.sha256),
            })?;
            let place = deb.path(self.cache)?;
            fs::rename(path, &place).attempt(|| format!("moving {}", place.display()))?;
        }
        Ok(())
    }

    fn show_one(&self, name: &str) -> Result<Stanza> {
        let stanzas = self.show([name.to_owned()].into_iter())?;
        let found = stanzas.into_iter().next();
        Ok(found.map(|(_, stanza)| stanza).unwrap_or_default())
    }

    fn show(&self, names: impl Iterator<Item = String>) -> Result<BTreeMap<String, Stanza>> {
        let mut command = self.command("apt-cache");
        command.args(["show", "--no-all-versions", "--"]).args(names);
        let text = self.run("asking apt about packages".to_owned(), &mut command)?;
        Ok(parse_stanzas(&String::from_utf8_lossy(&text)))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let option = |name: &str, path: &Path| format!("{name}={}", path.display());
        command
            .args(["-o", &option("Dir::State::status", &self.dir.join("status"))])
            .args(["-o", &option("Dir::Cache", &self.dir)])
            .args(["-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"]);
        command
    }

    fn run(&self, operation: String, command: &mut Command) -> Result<Vec<u8>> {
        let tool = Tool { operation, package: "apt", hint: HINT, limit: SOLVE_LIMIT };
        Ok(tool.run(command)?.stdout)
    }

    /// An answer from before, if the host's lists are the same, else a new one.
    fn remembered(
        &self,
        what: &str,
        question: &[&[String]],
        ask: impl FnOnce() -> Result<Vec<Deb>>,
    ) -> Result<Vec<Deb>> {
        let key = format!("{what} {question:?} {:?}", lists_stamp());
        let file = self.cache.dir("resolved")?.join(format!("{}.json", Blake3::of(key.as_bytes())));
        if let Ok(text) = fs::read(&file)
            && let Ok(known) = serde_json::from_slice::<Vec<Deb>>(&text)
        {
            return Ok(known);
        }
        let answer = ask()?;
        let text = serde_json::to_vec(&answer).expect("names and numbers always serialise");
        files::write_atomically(&file, &text)?;
        Ok(answer)
    }
}

/// Changes when the host's sources or package lists change.
fn lists_stamp() -> Vec<(PathBuf, u64, i64, i64)> {
    let mut stamp = Vec::new();
    for dir in
        ["/var/lib/apt/lists", "/etc/apt", "/etc/apt/sources.list.d", "/etc/apt/preferences.d"]
    {
        let Ok(entries) = fs::read_dir(dir) else { continue };
        for entry in entries.flatten() {
            if let Ok(facts) = entry.metadata().or_else(|_| fs::symlink_metadata(entry.path()))
                && facts.is_file()
            {
                stamp.push((entry.path(), facts.size(), facts.mtime(), facts.mtime_nsec()));
            }
        }
    }
    stamp.sort();
    stamp
}

/// `all` packages are asked for by the native architecture.
fn architecture(deb: &Deb) -> &str {
    if deb.architecture == "all" { "amd64" } else { &deb.architecture }
}

/// Name and version of every package in apt's list of URIs: `'URI' FILE SIZE HASH`.
fn parse_uris(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| {
            let file = line.split_whitespace().nth(1)?.strip_suffix(".deb")?;
            let mut parts = file.split('_');
            let (name, version) = (parts.next()?, parts.next()?);
            Some((name.to_owned(), version.replace("%3a", ":")))
        })
        .collect()
}

fn parse_stanzas(text: &str) -> BTreeMap<String, Stanza> {
    let mut stanzas = BTreeMap::new();
    for block in text.split("\n\n") {
        let fields: BTreeMap<&str, &str> = block
            .lines()
            .filter(|line| !line.starts_with(' '))
            .filter_map(|line| line.split_once(": "))
            .collect();
        let field = |name: &str| fields.get(name).copied().unwrap_or_default();
        let Some(name) = fields.get("Package") else { continue };
        let depends = [field("Pre-Depends"), field("Depends")].into_iter().flat_map(|list| {
            list.split(',').map(str::trim).filter(|need| !need.is_empty()).map(alternatives)
        });
        let stanza = Stanza {
            deb: field("Size").parse().ok().filter(|_| is_sha256(field("SHA256"))).map(|bytes| {
                Deb {
                    name: (*name).to_owned(),
                    version: field("Version").to_owned(),
                    architecture: field("Architecture").to_owned(),
                    sha256: field("SHA256").to_owned(),
                    bytes,
                }
            }),
            depends: depends.collect(),
            provides: alternatives(&field("Provides").replace(',', "|")),
        };
        stanzas.insert((*name).to_owned(), stanza);
    }
    stanzas
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// `a (>= 1) | b:any` is `a`, `b`.
fn alternatives(need: &str) -> Vec<String> {
    need.split('|')
        .filter_map(|one| one.split_whitespace().next())
        .map(|name| name.split(':').next().unwrap_or(name).to_owned())
        .collect()
}

/// What is reached from `roots` without going through `exclude`, within what apt chose.
fn prune(
    stanzas: &BTreeMap<String, Stanza>,
    roots: &[String],
    exclude: &[String],
) -> Result<Vec<Deb>> {
    let mut providers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, stanza) in stanzas {
        for provided in std::iter::once(name).chain(&stanza.provides) {
            providers.entry(provided).or_default().push(name);
        }
    }
    let mut kept = BTreeSet::new();
    let mut ahead: Vec<&str> = Vec::new();
    for root in roots {
        let found = providers.get(root.as_str()).ok_or_else(|| PackageError::Input {
            input: format!("Debian package {root}"),
            problem: format!("apt's answer does not have it; {HINT}"),
        })?;
        ahead.extend(found);
    }
    while let Some(name) = ahead.pop() {
        if !kept.insert(name) {
            continue;
        }
        for need in &stanzas[name].depends {
            // The first alternative that apt chose and that is not cut out.
            let candidates = need.iter().filter_map(|one| providers.get(one.as_str())).flatten();
            let chosen =
                candidates.copied().find(|candidate| !exclude.iter().any(|cut| cut == candidate));
            ahead.extend(chosen);
        }
    }
    kept.into_iter()
        .map(|name| {
            stanzas[name].deb.clone().ok_or_else(|| PackageError::Input {
                input: format!("Debian package {name}"),
                problem: format!("the package lists give no size and SHA-256 for it; {HINT}"),
            })
        })
        .collect()
}

/// Refuses what apt would take for an option or a path.
fn check_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"+-.:=~_".contains(&b);
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric())
        || !name.bytes().all(good)
        || name.ends_with(['+', '-']) && !name.contains("++")
    {
        return Err(PackageError::Input {
            input: format!("Debian package {name:?}"),
            problem: "is not the name of a package, as in redis-server or redis-server=5:7.0.15-1"
                .to_owned(),
        });
    }
    Ok(())
}

fn sha256_file(path: &Path) -> Result<String> {
    let attempt = || format!("reading {}", path.display());
    let mut file = files::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).attempt(attempt)? {
            0 => return Ok(hex(&hasher.finalize())),
            count => hasher.update(&buffer[..count]),
        }
    }
}

/// Bytes as lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTS: &str = "\
Package: app\nVersion: 1:2-3\nArchitecture: amd64\nPre-Depends: helpers (>= 1)\n\
Depends: libx (= 1), default-db | db-server, perl:any\nSize: 10\n\
SHA256: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n\
Description: a\n Depends: not a field\n\n\
Package: libx\nVersion: 1\nArchitecture: amd64\nSize: 20\n\
SHA256: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\n\n\
Package: smalldb\nVersion: 1\nArchitecture: all\nProvides: db-server (= 1), other\nSize: 5\n\
SHA256: cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc\n\n\
Package: perl\nVersion: 5\nArchitecture: amd64\nDepends: libperl\nSize: 1\n\
SHA256: dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd\n\n\
Package: libperl\nVersion: 5\nArchitecture: amd64\nSize: 1\n\
SHA256: eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee\n\n\
Package: helpers\nVersion: 1\nArchitecture: all\nDepends: perl\nSize: 1\n\
SHA256: ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff\n";

    fn names(exclude: &[&str]) -> Vec<String> {
        let exclude: Vec<String> = exclude.iter().map(|name| (*name).to_owned()).collect();
        let debs = prune(&parse_stanzas(LISTS), &["app".to_owned()], &exclude).unwrap();
        debs.into_iter().map(|deb| deb.name).collect()
    }

    #[test]
    fn what_is_cut_out_goes_with_everything_that_only_it_needs() {
        assert_eq!(names(&[]), ["app", "helpers", "libperl", "libx", "perl", "smalldb"]);
        assert_eq!(names(&["perl"]), ["app", "helpers", "libx", "smalldb"]);
        assert_eq!(names(&["perl", "helpers"]), ["app", "libx", "smalldb"]);
    }

    #[test]
    fn versions_with_an_epoch_are_read_from_the_list_of_uris() {
        let text = "'http://x/y/app_2-3_amd64.deb' app_1%3a2-3_amd64.deb 10 SHA256:aa\nnoise\n";
        assert_eq!(parse_uris(text), [("app".to_owned(), "1:2-3".to_owned())]);
        let app = &parse_stanzas(LISTS)["app"];
        assert_eq!(app.deb.as_ref().unwrap().version, "1:2-3");
        assert_eq!(app.depends[2], ["default-db", "db-server"]);
    }

    #[test]
    fn names_that_apt_would_take_for_options_are_refused() {
        for name in ["-oDir=/", "", "redis-", "./x.deb", "a b", "redis;true", "Ünder"] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["redis-server", "libstdc++6", "g++", "redis-server=5:7.0.15-1~deb12u10"] {
            check_name(name).unwrap();
        }
    }
}
