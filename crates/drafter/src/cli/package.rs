//! `package {build, inspect, verify, pack, unpack}`.
//!
//! Mounted by `drafter` and `architect`. Results go to standard output, as one line or table for
//! people or as one JSON object with `--json`; progress goes to standard error, and only to a
//! terminal.

use crate::package::{
    BuildRequest, Built, Cache, Manifest, Origin, Package, PackageId, Progress, archive, build,
    build::{
        Recipe, find_guest_program,
        recipe::{AddedFile, Kernel, RECIPE_VERSION, Root},
    },
    manifest::Port,
};
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use drafter_guest::config::{Check, Hook, Probe};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;
use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Make, look at, check and carry packages: what machines boot from.
#[derive(Debug, Args)]
pub struct PackageArgs {
    #[command(subcommand)]
    command: PackageCommand,

    /// Folder for downloads and finished builds [default: ~/.cache/drafter].
    #[arg(long, global = true, value_name = "DIR", env = crate::package::CACHE_VARIABLE)]
    cache: Option<PathBuf>,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum PackageCommand {
    /// Build a package from Debian packages, a directory, or an OCI image layout on disk.
    Build(Box<BuildArgs>),
    /// Show what is in a package.
    Inspect {
        /// A package's directory or .tar.zst.
        package: PathBuf,
    },
    /// Check every byte of a package against its manifest.
    Verify {
        /// A package's directory or .tar.zst.
        package: PathBuf,
        /// Refuse it unless it has this identity.
        #[arg(long, value_name = "HASH")]
        id: Option<PackageId>,
    },
    /// Write a package as one file.
    Pack {
        /// A package's directory.
        package: PathBuf,
        /// The file [default: NAME.tar.zst here].
        output: Option<PathBuf>,
    },
    /// Unpack a .tar.zst into a directory, checking it on the way.
    Unpack {
        /// The file.
        archive: PathBuf,
        /// The directory; must not exist yet, or be empty.
        output: PathBuf,
        /// Refuse more than this many bytes altogether.
        #[arg(long, value_name = "BYTES", value_parser = parse_size, default_value = "256G")]
        max_size: u64,
    },
}

/// What to build. A recipe file says all of it; flags say it without one, or change a recipe.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("source").required(true)
    .args(["recipe", "debian", "directory", "oci"]))]
pub struct BuildArgs {
    /// Name of the package [default: the recipe's, or that of the first Debian package].
    #[arg(long)]
    name: Option<String>,

    /// The package's directory, or a .tar.zst [default: it stays in the cache].
    #[arg(long, short, value_name = "PATH")]
    output: Option<PathBuf>,

    /// A recipe file (JSON).
    #[arg(long, short, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// Debian packages as the root, with all they need.
    #[arg(long, value_name = "PACKAGE", num_args = 1.., value_delimiter = ',')]
    debian: Vec<String>,

    /// A directory as the root.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,

    /// An OCI image layout as the root.
    #[arg(long, value_name = "DIR")]
    oci: Option<PathBuf>,

    /// Which image of the layout, by name or digest.
    #[arg(long, value_name = "NAME", requires = "oci")]
    image: Option<String>,

    /// Keep a Debian package out, with what only it needs.
    #[arg(long, value_name = "PACKAGE")]
    exclude: Vec<String>,

    /// Keep a Debian package in that is left out by default.
    #[arg(long, value_name = "PACKAGE")]
    include: Vec<String>,

    /// Debian package of the kernel [default: linux-image-cloud-amd64].
    #[arg(long, value_name = "PACKAGE")]
    kernel: Option<String>,

    /// Load a further kernel module at boot.
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,

    /// Kernel command line.
    #[arg(long, value_name = "TEXT")]
    command_line: Option<String>,

    /// Add a file: its path here, and in the machine.
    #[arg(long, value_name = "FILE:DEST", value_parser = parse_added)]
    add: Vec<AddedFile>,

    /// Add a variable to the entry point's environment.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,

    /// The entry point, with its arguments, as a shell would split them.
    #[arg(long, value_name = "COMMAND", value_parser = split_words)]
    entry: Option<Words>,

    /// Who the entry point runs as.
    #[arg(long)]
    user: Option<String>,

    /// A port that the machine listens on.
    #[arg(long, value_name = "[NAME=]PORT[/udp]", value_parser = str::parse::<Port>)]
    port: Vec<Port>,

    /// A TCP port that accepts connections when the machine serves.
    #[arg(long, value_name = "PORT")]
    ready_port: Option<u16>,

    /// Command to run before the machine is paused for a move.
    #[arg(long, value_name = "COMMAND", value_parser = split_words)]
    hook_before_suspend: Option<Words>,

    /// Command to run after the machine runs again.
    #[arg(long, value_name = "COMMAND", value_parser = split_words)]
    hook_after_resume: Option<Words>,

    /// Size of the first disk, as in 512M or 2G [default: twice what is in it, at least 512M].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    size: Option<u64>,

    /// Default memory, as in 256M.
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    memory: Option<u64>,

    /// Default number of virtual processors.
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u32>,

    /// The static guest program [default: beside this program, or in the build tree].
    #[arg(long, value_name = "FILE", env = crate::package::build::GUEST_VARIABLE)]
    guest_program: Option<PathBuf>,
}

/// A command line split into words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words(Vec<String>);

#[derive(Serialize)]
struct Described<'a> {
    path: &'a Path,
    id: PackageId,
    bytes: u64,
    bytes_on_disk: u64,
    manifest: &'a Manifest,
}

impl PackageArgs {
    /// Does what was asked and prints the result.
    ///
    /// # Errors
    /// In sentences for people.
    pub fn run(self, json: bool) -> anyhow::Result<()> {
        let cache = self.cache.map_or_else(Cache::default_for_user, Cache::at);
        let out = Out { json };
        match self.command {
            PackageCommand::Build(args) => run_build(*args, cache, out),
            PackageCommand::Inspect { package } => {
                inspect(&Package::open_with(&package, &cache)?, out)
            }
            PackageCommand::Verify { package, id } => verify(&package, id, &cache, out),
            PackageCommand::Pack { package, output } => pack(&package, output, &cache, out),
            PackageCommand::Unpack { archive, output, max_size } => {
                let package = archive::unpack(&archive, &output, max_size)?;
                out.print(&described(&package)?, |to| {
                    writeln!(to, "{}  {}", package.id(), package.dir().display())
                })
            }
        }
    }
}

/// Where results go.
#[derive(Clone, Copy)]
struct Out {
    json: bool,
}

impl Out {
    fn print(
        self,
        value: &impl Serialize,
        text: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        let mut stdout = io::stdout().lock();
        let written = if self.json {
            serde_json::to_writer_pretty(&mut stdout, value)?;
            writeln!(stdout)
        } else {
            text(&mut stdout)
        };
        match written {
            // Whoever read it has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.context("writing the result"),
        }
    }
}

fn described(package: &Package) -> anyhow::Result<Described<'_>> {
    let (bytes, bytes_on_disk) = package.sizes()?;
    let manifest = package.manifest();
    Ok(Described { path: package.dir(), id: package.id(), bytes, bytes_on_disk, manifest })
}

fn run_build(args: BuildArgs, cache: Cache, out: Out) -> anyhow::Result<()> {
    let begin = Instant::now();
    let guest_program = match args.guest_program.clone() {
        Some(path) => path,
        None => find_guest_program()?,
    };
    let output = args.output.clone();
    let request = BuildRequest { recipe: args.into_recipe()?, guest_program, cache, output };
    let bar = ProgressBar::new_spinner();
    bar.set_style(
        ProgressStyle::with_template("{spinner} {elapsed} {msg}").expect("the template is valid"),
    );
    bar.enable_steady_tick(Duration::from_millis(100));
    let built = build(&request, &mut |step| bar.set_message(sentence(&step)));
    bar.finish_and_clear();
    let Built { package, origin, key } = built?;
    let place = match &request.output {
        Some(path) => path.clone(),
        None => package.dir().to_owned(),
    };

    #[derive(Serialize)]
    struct Result<'a> {
        origin: Origin,
        key: String,
        output: &'a Path,
        seconds: f64,
        package: Described<'a>,
    }
    let seconds = begin.elapsed().as_secs_f64();
    let result = Result {
        origin,
        key: key.to_string(),
        output: &place,
        seconds,
        package: described(&package)?,
    };
    out.print(&result, |to| {
        let how = match origin {
            Origin::Cache => "cached",
            Origin::Made => "built",
        };
        let size = HumanBytes(result.package.bytes_on_disk);
        let name = &package.manifest().name;
        writeln!(to, "{name}: {how} in {seconds:.1} s, {size} on disk, at {}", place.display())?;
        writeln!(to, "{}", package.id())
    })
}

fn sentence(step: &Progress) -> String {
    match step {
        Progress::Resolving => "looking up what is needed".to_owned(),
        Progress::Downloading { files, bytes } => {
            format!("downloading {files} Debian packages ({})", HumanBytes(*bytes))
        }
        Progress::Kernel => "unpacking the kernel and its modules".to_owned(),
        Progress::Root { index, count, name } => {
            format!("filling the root: {name} ({} of {count})", index + 1)
        }
        Progress::Disk { bytes } => format!("making a disk of {}", HumanBytes(*bytes)),
        Progress::Output => "copying the package to its place".to_owned(),
    }
}

impl BuildArgs {
    fn into_recipe(self) -> anyhow::Result<Recipe> {
        let mut recipe = self.base()?;
        if let Some(name) = self.name {
            recipe.name = name;
        }
        if let Root::Debian { exclude, include, .. } = &mut recipe.root {
            exclude.extend(self.exclude);
            include.extend(self.include);
        } else if !self.exclude.is_empty() || !self.include.is_empty() {
            bail!("--exclude and --include are for roots of Debian packages");
        }
        if let Some(kernel) = self.kernel {
            recipe.kernel = Kernel::Debian(kernel);
        }
        recipe.modules.extend(self.module);
        recipe.command_line = self.command_line.unwrap_or(recipe.command_line);
        recipe.files.extend(self.add);
        recipe.ports.extend(self.port);
        recipe.vcpus = self.vcpus.unwrap_or(recipe.vcpus);
        recipe.disk_mib = self.size.map(mebibytes).or(recipe.disk_mib);
        recipe.memory_mib = self.memory.map_or(recipe.memory_mib, mebibytes);
        let entry = &mut recipe.entry;
        entry.argv = self.entry.map(|words| words.0).or_else(|| entry.argv.take());
        entry.user = self.user.or_else(|| entry.user.take());
        entry.env.extend(self.env);
        let hook = |words: Words| Hook { argv: words.0, timeout: Duration::from_secs(10) };
        let hooks = &mut entry.hooks;
        hooks.before_suspend =
            self.hook_before_suspend.map(hook).or_else(|| hooks.before_suspend.take());
        hooks.after_resume = self.hook_after_resume.map(hook).or_else(|| hooks.after_resume.take());
        if let Some(port) = self.ready_port {
            entry.probes.readiness = Some(Probe {
                check: Check::Tcp { port },
                interval: Duration::from_millis(200),
                timeout: Duration::from_secs(1),
            });
        }
        Ok(recipe)
    }

    /// The recipe file, or an empty recipe for the source that the flags name.
    fn base(&self) -> anyhow::Result<Recipe> {
        if let Some(path) = &self.recipe {
            return Ok(Recipe::read(path)?);
        }
        let named_after = |path: &Path| {
            let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let (name, root) = if let Some(path) = &self.directory {
            (named_after(path), Root::Directory { path: path.clone() })
        } else if let Some(layout) = &self.oci {
            let root = Root::Oci { layout: layout.clone(), image: self.image.clone() };
            (named_after(layout), root)
        } else {
            let Some(first) = self.debian.first() else {
                bail!("say what the root is: --recipe, --debian, --directory or --oci");
            };
            let root = Root::Debian {
                packages: self.debian.clone(),
                exclude: Vec::new(),
                include: Vec::new(),
            };
            (first.split('=').next().unwrap_or(first).to_owned(), root)
        };
        let recipe = Recipe::new(name, root);
        debug_assert_eq!(recipe.recipe, RECIPE_VERSION);
        Ok(recipe)
    }
}

fn inspect(package: &Package, out: Out) -> anyhow::Result<()> {
    let described = described(package)?;
    out.print(&described, |to| {
        let manifest = package.manifest();
        let mut row = |name: &str, value: String| writeln!(to, "{name:<12} {value}");
        row("name", manifest.name.clone())?;
        row("identity", described.id.to_string())?;
        row("path", described.path.display().to_string())?;
        let sizes = (HumanBytes(described.bytes), HumanBytes(described.bytes_on_disk));
        row("size", format!("{}, {} on disk", sizes.0, sizes.1))?;
        let memory = HumanBytes(manifest.memory_bytes);
        row("machine", format!("{}, {} vCPU, {memory}", manifest.machine_type, manifest.vcpus))?;
        let cpu = &manifest.cpu;
        row("cpu", [&[cpu.architecture.clone()], &*cpu.features].concat().join(" "))?;
        row("kernel", format!("{} ({})", manifest.kernel_release, manifest.command_line))?;
        row("entry", format!("{:?}", manifest.guest.argv))?;
        let user = &manifest.guest.user;
        row("user", if user.is_empty() { "root".to_owned() } else { user.clone() })?;
        for port in &manifest.ports {
            let protocol = format!("{:?}", port.protocol).to_lowercase();
            row("port", format!("{} {}/{protocol}", port.name, port.port))?;
        }
        for device in &manifest.devices {
            row("disk", format!("{} {}", device.name, HumanBytes(device.bytes)))?;
        }
        row("built by", format!("{} from {} sources", manifest.created_by, manifest.sources.len()))
    })
}

fn verify(path: &Path, id: Option<PackageId>, cache: &Cache, out: Out) -> anyhow::Result<()> {
    let package = Package::open_with(path, cache)?;
    if let Some(expected) = id
        && expected != package.id()
    {
        bail!("{} is package {}, not {expected}", path.display(), package.id());
    }
    let begin = Instant::now();
    let verified = package.verify(cache)?;
    let seconds = begin.elapsed().as_secs_f64();

    #[derive(Serialize)]
    struct Result {
        id: PackageId,
        seconds: f64,
        #[serde(flatten)]
        verified: crate::package::Verified,
    }
    out.print(&Result { id: package.id(), seconds, verified }, |to| {
        let (all, read) = (HumanBytes(verified.bytes), HumanBytes(verified.hashed_bytes));
        let files = verified.files;
        writeln!(to, "{}: good ({files} files, {all}; {read} hashed now)", package.id())
    })
}

fn pack(path: &Path, output: Option<PathBuf>, cache: &Cache, out: Out) -> anyhow::Result<()> {
    let package = Package::open_with(path, cache)?;
    let name = &package.manifest().name;
    let output = output.unwrap_or_else(|| archive::default_name(Path::new("."), name));
    archive::pack(&package, &output, cache)?;
    let bytes = std::fs::metadata(&output)
        .with_context(|| format!("looking at {}", output.display()))?
        .len();

    #[derive(Serialize)]
    struct Result<'a> {
        id: PackageId,
        output: &'a Path,
        bytes: u64,
    }
    out.print(&Result { id: package.id(), output: &output, bytes }, |to| {
        writeln!(to, "{}  {} ({})", package.id(), output.display(), HumanBytes(bytes))
    })
}

fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Reads a number of bytes with an optional K, M, G or T (powers of 1024).
fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim_end_matches("iB").trim_end_matches('B');
    let (number, shift) = match trimmed.char_indices().last() {
        Some((at, 'K' | 'k')) => (&trimmed[..at], 10),
        Some((at, 'M' | 'm')) => (&trimmed[..at], 20),
        Some((at, 'G' | 'g')) => (&trimmed[..at], 30),
        Some((at, 'T' | 't')) => (&trimmed[..at], 40),
        _ => (trimmed, 0),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("{text:?} is not a size, as in 512M or 2G"))
}

fn parse_added(text: &str) -> Result<AddedFile, String> {
    match text.rsplit_once(':') {
        Some((from, to)) if !from.is_empty() && to.starts_with('/') => Ok(AddedFile {
            from: from.into(),
            to: to.to_owned(),
            owner: "root".to_owned(),
            mode: None,
        }),
        _ => Err(format!("{text:?} is not of the form FILE:/PATH/IN/THE/MACHINE")),
    }
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not of the form NAME=VALUE")),
    }
}

/// Splits a command line at blanks; quotes and backslashes work as in a shell, and nothing else
/// does (there is no shell in the machine).
fn split_words(text: &str) -> Result<Words, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => match chars.next() {
                Some(next) => word.get_or_insert_default().push(next),
                None => return Err(format!("{text:?} ends with a backslash")),
            },
            (None, ' ' | '\t' | '\n') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(format!("{text:?} has a quote that is not closed"));
    }
    words.extend(word);
    if words.first().is_none_or(String::is_empty) {
        return Err("a command needs a program".to_owned());
    }
    Ok(Words(words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        package: PackageArgs,
    }

    fn recipe(arguments: &[&str]) -> anyhow::Result<Recipe> {
        let all = ["test", "build"].iter().chain(arguments);
        match Cli::try_parse_from(all)?.package.command {
            PackageCommand::Build(args) => args.into_recipe(),
            other => bail!("{other:?}"),
        }
    }

    #[test]
    fn the_commands_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_alone_make_a_recipe() {
        let recipe = recipe(&[
            "--debian",
            "redis-server=5:7,redis-tools",
            "--size",
            "1G",
            "--memory",
            "128M",
            "--entry",
            r#"redis-server --save "" 'a b' c\ d"#,
            "--env",
            "A=b=c",
            "--port",
            "redis=6379",
            "--port",
            "53/udp",
            "--add",
            "x:y:/etc/z",
            "--hook-before-suspend",
            "/bin/sync",
            "--ready-port",
            "6379",
            "--exclude",
            "libssl3",
        ])
        .unwrap();
        assert_eq!(recipe.name, "redis-server");
        assert_eq!((recipe.disk_mib, recipe.memory_mib), (Some(1024), 128));
        let argv = recipe.entry.argv.unwrap();
        assert_eq!(argv, ["redis-server", "--save", "", "a b", "c d"]);
        assert_eq!(recipe.entry.env["A"], "b=c");
        assert_eq!(recipe.ports[1].protocol, conduit::Protocol::Udp);
        assert_eq!(recipe.files[0].from, Path::new("x:y"));
        assert_eq!(recipe.entry.hooks.before_suspend.unwrap().argv, ["/bin/sync"]);
        assert_eq!(recipe.entry.probes.readiness.unwrap().check, Check::Tcp { port: 6379 });
    }

    #[test]
    fn a_source_is_required_and_only_one_is_taken() {
        assert!(recipe(&[]).unwrap_err().to_string().contains("--debian"));
        assert!(recipe(&["--debian", "a", "--oci", "b"]).is_err());
        let text = recipe(&["--directory", "/etc", "--exclude", "a"]).unwrap_err().to_string();
        assert!(text.contains("Debian"), "{text}");
    }

    #[test]
    fn the_recipe_of_the_repository_is_valid_and_flags_change_it() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packages/redis.json");
        let plain = recipe(&["--recipe", path]).unwrap();
        assert_eq!((&*plain.name, plain.memory_mib), ("redis", 256));
        let changed = recipe(&["--recipe", path, "--name", "other", "--memory", "1G"]).unwrap();
        assert_eq!((&*changed.name, changed.memory_mib), ("other", 1024));
        assert_eq!(changed.entry, plain.entry);
    }

    #[test]
    fn sizes_and_commands_that_cannot_be_read_are_refused() {
        assert_eq!(parse_size("512MiB").unwrap(), 512 << 20);
        assert_eq!(parse_size("7").unwrap(), 7);
        for text in ["", "M", "-1", "1X", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for text in ["", "  ", "'a", "a\\", "\"\""] {
            assert!(split_words(text).is_err(), "{text}");
        }
    }
}
