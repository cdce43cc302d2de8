//! Builds packages: a kernel, an initramfs and a root, from Debian packages, a directory or an OCI
//! image layout.
//!
//! Called by `drafter package build` and by whoever needs a package in a program ([`build()`]). The
//! inputs are resolved and hashed first; their hash is the build's key, and a finished build with
//! that key is used again. Everything after that works on files that were named by content, so the
//! same key always gives the same bytes.
//!
//! ```text
//! recipe ─→ inputs (debs, image digest, hashes) ─→ key ─→ in the cache? ─→ package
//!                                                          │ no
//!                 tree ─→ root.ext4    kernel    initramfs ┴─→ manifest ─→ package
//! ```
//!
//! Needs no root: nothing is mounted, installed or extracted by path.

mod accounts;
mod assemble;
mod deb;
mod debian;
mod directory;
mod ext4;
mod initramfs;
mod kernel;
mod layer;
mod modules;
mod oci;
pub mod recipe;
mod root;
mod tool;
mod tree;

pub use debian::DEFAULT_EXCLUDE;
pub use recipe::Recipe;

use super::{
    Package,
    cache::{Cache, Origin},
    error::{Attempt, PackageError, Result},
    files,
    manifest::{Blake3, MANIFEST_FILE},
    verify,
};
use debian::{Apt, Deb};
use recipe::{Kernel, Root};
use serde::Serialize;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Changes whenever the builder would make other bytes of the same inputs.
const BUILDER: u32 = 1;

/// Where the guest program is looked for besides the directory of the running program.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu/guest";

/// Largest guest program.
const MAX_GUEST_PROGRAM: u64 = 256 << 20;

const GUEST_PROGRAM: &str = "drafter-guest";

/// Names the guest program where no flag does.
pub const GUEST_VARIABLE: &str = "DRAFTER_GUEST";

/// What to build, with what, and where to.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// What goes into the package.
    pub recipe: Recipe,
    /// The static guest program; see [`find_guest_program`].
    pub guest_program: PathBuf,
    /// Where downloads and finished builds are kept.
    pub cache: Cache,
    /// The package's directory, or the archive if it ends in `.tar.zst`. None: the package stays
    /// in the cache.
    pub output: Option<PathBuf>,
}

/// A finished build.
#[derive(Clone, Debug)]
pub struct Built {
    /// The package, at its output if that is a directory, else in the cache.
    pub package: Package,
    /// Whether it was built now.
    pub origin: Origin,
    /// Hash of all inputs.
    pub key: Blake3,
}

/// What a build is doing; for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Asks apt, hashes files.
    Resolving,
    /// Fetches Debian packages.
    Downloading {
        /// How many.
        files: usize,
        /// How much.
        bytes: u64,
    },
    /// Unpacks the kernel and its modules.
    Kernel,
    /// Puts package or layer `index` of `count` into the root.
    Root {
        /// Which, from 0.
        index: usize,
        /// How many there are.
        count: usize,
        /// Its name.
        name: String,
    },
    /// Writes the disk's image.
    Disk {
        /// Its size.
        bytes: u64,
    },
    /// Copies or packs the package to its output.
    Output,
}

/// Called with every step.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

/// All inputs by their content; its hash is the key of the build.
#[derive(Debug, Serialize)]
struct Inputs<'a> {
    builder: u32,
    created_by: String,
    /// Without the paths of this host, which [`keyless`] removed.
    recipe: Recipe,
    ext4: String,
    guest_program: Blake3,
    kernel: KernelInput,
    root: RootInput,
    files: Vec<Blake3>,
    #[serde(skip)]
    request: &'a BuildRequest,
}

#[derive(Debug, Serialize)]
enum KernelInput {
    Deb(Deb),
    Files { image: Blake3, modules: Blake3, release: String },
}

#[derive(Debug, Serialize)]
enum RootInput {
    Debs(Vec<Deb>),
    Directory(Blake3),
    Oci { digest: String },
}

/// Builds a package, or finds it in the cache.
///
/// # Errors
/// Says which input is missing, wrong or too large, or which tool failed; nothing is left at the
/// output then, except what was there before.
pub fn build(request: &BuildRequest, progress: OnProgress<'_>) -> Result<Built> {
    request.recipe.check()?;
    progress(Progress::Resolving);
    let inputs = resolve(request)?;
    let text = serde_json::to_vec(&inputs).expect("names, numbers and hashes always serialise");
    let key = Blake3::of(&text);
    let make = |progress: OnProgress<'_>| {
        request.cache.folder("builds", &key.to_string(), |work| {
            assemble::assemble(&inputs, &key, work, progress)
        })
    };
    let (mut dir, mut origin) = make(&mut *progress)?;
    let mut package = Package::open_dir(&dir);
    if origin == Origin::Cache
        && let Err(error) = package.as_ref().map_err(ToString::to_string).and_then(|package| {
            package.verify(&request.cache).map(drop).map_err(|error| error.to_string())
        })
    {
        tracing::warn!(%error, "a build in the cache is damaged and is made again");
        fs::remove_dir_all(&dir).attempt(|| format!("removing {}", dir.display()))?;
        (dir, origin) = make(&mut *progress)?;
        package = Package::open_dir(&dir);
    }
    let mut package = package?;
    if let Some(output) = &request.output {
        progress(Progress::Output);
        if output.to_string_lossy().ends_with(super::archive::SUFFIX) {
            super::archive::pack(&package, output, &request.cache)?;
        } else {
            package = publish(&package, output, &request.cache)?;
        }
    }
    Ok(Built { package, origin, key })
}

/// The guest program: `$DRAFTER_GUEST`, else beside the running program, else in the build tree
/// that the running program lies in, or that is called `target` here.
///
/// # Errors
/// Says where it was looked for and how to build it.
pub fn find_guest_program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(GUEST_VARIABLE).filter(|value| !value.is_empty()) {
        return Ok(path.into());
    }
    let mut places = Vec::new();
    if let Ok(program) = std::env::current_exe() {
        // In guest/ beside it, as installed; beside it; and from target/debug/… to
        // target/TRIPLE/guest, where scripts/build.sh puts it.
        places.extend(program.parent().map(|dir| dir.join("guest").join(GUEST_PROGRAM)));
        places.extend(program.parent().map(|dir| dir.join(GUEST_PROGRAM)));
        let above = program.ancestors().skip(2).take(3);
        places.extend(above.map(|dir| dir.join(GUEST_TARGET).join(GUEST_PROGRAM)));
    }
    places.push(Path::new("target").join(GUEST_TARGET).join(GUEST_PROGRAM));
    // The one beside a development build may be the host's, dynamically linked; take what runs.
    let usable = |path: &PathBuf| {
        files::read_bounded(path, MAX_GUEST_PROGRAM)
            .is_ok_and(|program| kernel::check_static(&program, path).is_ok())
    };
    places.iter().find(|path| usable(path)).cloned().ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|path| path.display().to_string()).collect();
        PackageError::Input {
            input: format!("the static guest program {GUEST_PROGRAM}"),
            problem: format!(
                "is at none of {}; build it (`cargo build -p drafter-guest --profile guest \
                 --target x86_64-unknown-linux-gnu` with `-C target-feature=+crt-static`), or name \
                 it with {GUEST_VARIABLE}",
                places.join(", ")
            ),
        }
    })
}

fn resolve(request: &BuildRequest) -> Result<Inputs<'_>> {
    let recipe = &request.recipe;
    let kernel = match &recipe.kernel {
        Kernel::Debian(name) => KernelInput::Deb(Apt::new(&request.cache)?.kernel(name)?),
        Kernel::Files { image, modules } => KernelInput::Files {
            image: verify::hash_remembered(image, &request.cache)?.0,
            modules: directory::hash(modules)?,
            release: modules
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
        },
    };
    let root = match &recipe.root {
        Root::Debian { packages, exclude, include } => RootInput::Debs(
            Apt::new(&request.cache)?.closure(packages, &Root::excluded(exclude, include))?,
        ),
        Root::Directory { path } => RootInput::Directory(directory::hash(path)?),
        Root::Oci { layout, image } => {
            RootInput::Oci { digest: oci::Image::open(layout, image.as_deref())?.digest }
        }
    };
    let hash = |path: &Path| {
        // Opens it first, so that a directory or a missing file is an error that says so.
        directory::file(path, None)?;
        Ok(verify::hash_remembered(path, &request.cache)?.0)
    };
    Ok(Inputs {
        builder: BUILDER,
        created_by: concat!("drafter ", env!("CARGO_PKG_VERSION")).to_owned(),
        recipe: keyless(recipe),
        ext4: ext4::version()?,
        guest_program: hash(&request.guest_program)?,
        kernel,
        root,
        files: recipe.files.iter().map(|file| hash(&file.from)).collect::<Result<_>>()?,
        request,
    })
}

/// The recipe without what is known by content: a checkout elsewhere has the same key.
fn keyless(recipe: &Recipe) -> Recipe {
    let mut recipe = recipe.clone();
    match &mut recipe.root {
        Root::Debian { .. } => {}
        Root::Directory { path } | Root::Oci { layout: path, .. } => path.clear(),
    }
    if let Kernel::Files { image, modules } = &mut recipe.kernel {
        image.clear();
        modules.clear();
    }
    recipe.files.iter_mut().for_each(|file| file.from.clear());
    recipe
}

/// Copies a package to `output`, which may hold nothing, or a package, which is replaced.
fn publish(package: &Package, output: &Path, cache: &Cache) -> Result<Package> {
    let attempt = || format!("putting the package at {}", output.display());
    let old = match fs::read_dir(output) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(error).attempt(attempt),
    };
    if old {
        match Package::open_dir(output) {
            Ok(old) if old.id() == package.id() && old.verify(cache).is_ok() => return Ok(old),
            // Damaged or of another build: a package all the same, so it may go.
            Ok(_) => {}
            Err(_) if output.join(MANIFEST_FILE).is_file() => {}
            Err(error) => return Err(error),
        }
    }
    let parent = output.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    files::make_dir(parent)?;
    let scratch = tempfile::TempDir::new_in(parent).attempt(attempt)?;
    let new = scratch.path().join("new");
    files::make_dir(&new)?;
    for entry in package.manifest().files() {
        files::copy_sparse(&package.dir().join(&entry.file), &new.join(&entry.file))?;
    }
    let manifest = fs::read(package.dir().join(MANIFEST_FILE)).attempt(attempt)?;
    fs::write(new.join(MANIFEST_FILE), manifest).attempt(attempt)?;
    if old {
        fs::rename(output, scratch.path().join("old")).attempt(attempt)?;
    }
    fs::rename(&new, output).attempt(attempt)?;
    Package::open_dir(output)
}

#[cfg(test)]
mod tests;
