//! `package {build, inspect, verify, pack, unpack}`.
//!
//! Mounted by `drafter` and `architect`. Results go to standard output, as one line or table for
//! people or as one JSON object with `--json`; progress goes to standard error, and only to a
//! terminal.

mod args;

pub use args::BuildArgs;

use crate::package::{
    BuildRequest, Built, Cache, Manifest, Origin, Package, PackageId, Progress, archive, build,
    build::find_guest_program,
};
use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde::Serialize;
use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Make, look at, check and carry packages: what machines boot from.
#[derive(Debug, Subcommand)]
pub enum PackageCommand {
    /// Build a package from Debian packages, a directory, or an OCI image layout on disk.
    Build(Box<BuildArgs>),
    /// Show what is in a package.
    Inspect {
        /// A package's directory or .tar.zst.
        package: PathBuf,
        /// See there.
        #[command(flatten)]
        cache: CacheArgs,
    },
    /// Check every byte of a package against its manifest.
    Verify {
        /// A package's directory or .tar.zst.
        package: PathBuf,
        /// Refuse it unless it has this identity.
        #[arg(long, value_name = "HASH")]
        id: Option<PackageId>,
        /// See there.
        #[command(flatten)]
        cache: CacheArgs,
    },
    /// Write a package as one file.
    Pack {
        /// A package's directory.
        package: PathBuf,
        /// The file [default: NAME.tar.zst here].
        output: Option<PathBuf>,
        /// See there.
        #[command(flatten)]
        cache: CacheArgs,
    },
    /// Unpack a .tar.zst into a directory, checking it on the way.
    Unpack {
        /// The file.
        archive: PathBuf,
        /// The directory; must not exist yet, or be empty.
        output: PathBuf,
        /// Refuse more than this many bytes altogether.
        #[arg(long, value_name = "BYTES", value_parser = args::parse_size, default_value = "256G")]
        max_size: u64,
    },
}

/// Where what can be used again is kept.
#[derive(Debug, Default, Args)]
pub struct CacheArgs {
    /// Folder for downloads, finished builds and unpacked archives [default: ~/.cache/drafter].
    #[arg(long, value_name = "DIR", env = crate::package::CACHE_VARIABLE)]
    cache: Option<PathBuf>,
}

impl CacheArgs {
    fn cache(self) -> Cache {
        self.cache.map_or_else(Cache::default_for_user, Cache::at)
    }
}

#[derive(Serialize)]
struct Described<'a> {
    path: &'a Path,
    id: PackageId,
    bytes: u64,
    bytes_on_disk: u64,
    manifest: &'a Manifest,
}

/// Does what was asked and prints the result, as JSON if `json`.
///
/// # Errors
/// In sentences for people.
pub fn execute(command: PackageCommand, json: bool) -> anyhow::Result<()> {
    let out = Out { json };
    match command {
        PackageCommand::Build(args) => run_build(*args, out),
        PackageCommand::Inspect { package, cache } => {
            inspect(&Package::open_with(&package, &cache.cache())?, out)
        }
        PackageCommand::Verify { package, id, cache } => verify(&package, id, &cache.cache(), out),
        PackageCommand::Pack { package, output, cache } => {
            pack(&package, output, &cache.cache(), out)
        }
        PackageCommand::Unpack { archive, output, max_size } => {
            let package = archive::unpack(&archive, &output, max_size)?;
            out.print(&described(&package)?, |to| {
                writeln!(to, "{}  {}", package.id(), package.dir().display())
            })
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

fn run_build(mut args: BuildArgs, out: Out) -> anyhow::Result<()> {
    let begin = Instant::now();
    let guest_program = match args.guest_program.take() {
        Some(path) => path,
        None => find_guest_program()?,
    };
    let output = args.output.take();
    let cache = std::mem::take(&mut args.cache).cache();
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
        row("cpu", format!("{} {}", cpu.architecture, cpu.features.join(" ")))?;
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
