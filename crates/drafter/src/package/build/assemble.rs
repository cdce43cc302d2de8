//! Makes the files of a package out of resolved inputs.

use super::{
    Inputs, KernelInput, MAX_GUEST_PROGRAM, OnProgress, Progress, RootInput,
    debian::{Apt, Deb},
    ext4, initramfs, kernel,
    layer::{Rules, Store, apply},
    modules::{ModuleSet, REQUIRED},
    recipe::{Kernel, Recipe},
    root::{self, ImageDefaults},
    tree::{Kind, Merge, Tree},
};
use crate::package::{
    cache::Cache,
    error::{Attempt, PackageError, Result},
    files,
    manifest::{
        Blake3, CpuNeeds, Device, FORMAT, FORMAT_VERSION, FileEntry, MANIFEST_FILE, Manifest, Port,
        Source,
    },
};
use drafter_guest::config::MachineConfig;
use std::{
    fs,
    path::{Path, PathBuf},
};

const KERNEL_FILE: &str = "kernel";
const INITRAMFS_FILE: &str = "initramfs.cpio";
const ROOT_FILE: &str = "root.ext4";

/// Largest kernel image that is read.
const MAX_IMAGE: u64 = 512 << 20;
/// Most bytes that the files of a kernel package hold.
const MAX_KERNEL_PACKAGE: u64 = 8 << 30;
/// Most bytes in a root whose disk has no given size.
const MAX_ROOT: u64 = 256 << 30;

/// Fills the empty directory `work` with a package.
pub(super) fn assemble(
    inputs: &Inputs<'_>,
    key: &Blake3,
    work: &Path,
    progress: OnProgress<'_>,
) -> Result<()> {
    let request = inputs.request;
    let recipe = &request.recipe;
    let guest = files::read_bounded(&request.guest_program, MAX_GUEST_PROGRAM)?;
    kernel::check_static(&guest, &request.guest_program)?;
    download(inputs, &request.cache, progress)?;

    progress(Progress::Kernel);
    let kernel = prepare_kernel(&inputs.kernel, &recipe.kernel, &request.cache)?;
    let mut wanted: Vec<String> = REQUIRED.iter().map(|name| (*name).to_owned()).collect();
    wanted.extend(recipe.modules.iter().cloned());
    let modules = ModuleSet::scan(&kernel.modules)?.ordered(&wanted)?;
    let kernel_entry = write(work, KERNEL_FILE, &kernel.image)?;
    let initramfs_entry = write(work, INITRAMFS_FILE, &initramfs::make(&guest, &modules))?;

    // The staging files lie beside the package, not in it.
    let stage = request.cache.scratch()?;
    let limit = recipe.disk_mib.map_or(MAX_ROOT, |mib| mib << 20);
    let mut store = Store::new(stage.path().to_owned(), limit);
    let mut tree = Tree::new();
    let debs = match &inputs.root {
        RootInput::Debs(debs) => &**debs,
        _ => &[],
    };
    let image = root::fill(&mut tree, recipe, debs, &request.cache, &mut store, progress)?;
    let guest_config = guest_config(recipe, &image)?;
    root::finish(&mut tree, recipe, &request.guest_program, &guest_config, &mut store)?;

    check_program(&tree, &guest_config, recipe)?;

    let bytes = recipe.disk_mib.map_or_else(|| ext4::default_bytes(&tree), |mib| mib << 20);
    progress(Progress::Disk { bytes });
    let seed = Blake3::of(&[&key.0[..], b"root"].concat());
    let root_hash = ext4::write(&tree, &work.join(ROOT_FILE), bytes, &seed)?;

    let manifest = Manifest {
        format: FORMAT.to_owned(),
        version: FORMAT_VERSION,
        name: recipe.name.clone(),
        created_by: inputs.created_by.clone(),
        machine_type: "microvm".to_owned(),
        cpu: CpuNeeds { architecture: "x86_64".to_owned(), features: sorted(&recipe.cpu_features) },
        memory_bytes: recipe.memory_mib << 20,
        vcpus: recipe.vcpus,
        kernel_release: kernel.release,
        command_line: recipe.command_line.clone(),
        guest: guest_config,
        ports: ports(recipe, &image),
        devices: vec![Device {
            name: "root".to_owned(),
            file: ROOT_FILE.to_owned(),
            bytes,
            blake3: root_hash,
        }],
        kernel: kernel_entry,
        initramfs: initramfs_entry,
        sources: sources(inputs),
    };
    let text = manifest.to_json();
    // What was built must be what is accepted.
    Manifest::from_json(text.as_bytes(), &work.join(MANIFEST_FILE)).map_err(|error| {
        PackageError::Request { name: recipe.name.clone(), problem: error.to_string() }
    })?;
    fs::write(work.join(MANIFEST_FILE), text)
        .attempt(|| format!("writing {MANIFEST_FILE} in {}", work.display()))
}

fn download(inputs: &Inputs<'_>, cache: &Cache, progress: OnProgress<'_>) -> Result<()> {
    let mut debs: Vec<Deb> = Vec::new();
    if let KernelInput::Deb(deb) = &inputs.kernel {
        debs.push(deb.clone());
    }
    if let RootInput::Debs(all) = &inputs.root {
        debs.extend(all.iter().cloned());
    }
    if debs.is_empty() {
        return Ok(());
    }
    Apt::new(cache)?.download(&debs, &mut |files, bytes| {
        progress(Progress::Downloading { files, bytes });
    })
}

struct PreparedKernel {
    image: Vec<u8>,
    modules: PathBuf,
    release: String,
}

fn prepare_kernel(input: &KernelInput, asked: &Kernel, cache: &Cache) -> Result<PreparedKernel> {
    match (input, asked) {
        (KernelInput::Deb(deb), _) => {
            let deb_file = deb.path(cache)?;
            let (dir, _) =
                cache.folder("kernels", &deb.sha256, |work| unpack_kernel(&deb_file, work))?;
            let release = files::read_bounded(&dir.join("release"), 256)?;
            let release = String::from_utf8_lossy(&release).into_owned();
            let image = files::read_bounded(&dir.join(KERNEL_FILE), MAX_IMAGE)?;
            Ok(PreparedKernel { image, modules: dir.join("modules"), release })
        }
        (KernelInput::Files { release, .. }, Kernel::Files { image, modules }) => {
            let packed = files::read_bounded(image, MAX_IMAGE)?;
            Ok(PreparedKernel {
                image: kernel::extract(&packed, image)?,
                modules: modules.clone(),
                release: release.clone(),
            })
        }
        (KernelInput::Files { .. }, Kernel::Debian(_)) => {
            unreachable!("inputs are resolved from the same recipe")
        }
    }
}

/// Unpacks a kernel package: `kernel` (ELF), `modules/` and `release`.
fn unpack_kernel(deb: &Path, work: &Path) -> Result<()> {
    let wrong = |problem: &str| PackageError::Input {
        input: format!("kernel package {}", deb.display()),
        problem: format!("{problem}; name another package with the recipe's \"kernel\""),
    };
    let stage = tempfile::TempDir::new_in(work)
        .attempt(|| format!("creating a directory in {}", work.display()))?;
    let mut store = Store::new(stage.path().to_owned(), MAX_KERNEL_PACKAGE);
    let mut tree = Tree::new();
    // Debian's later kernels keep modules below /usr.
    let usable = |path: &[u8]| {
        let path = path.strip_prefix(b"usr/").unwrap_or(path);
        path.starts_with(b"lib/modules/") || path.starts_with(b"boot/vmlinuz-")
    };
    let rules = Rules {
        name: deb,
        merge: Merge::ThroughLinks,
        whiteouts: false,
        drop: &|path| !usable(path),
    };
    apply(&mut tree, super::deb::data(deb)?, &rules, &mut store)?;
    let mut release = None;
    for (path, number) in tree.names() {
        let Kind::File { blob, .. } = &tree.inode(number).kind else { continue };
        let text = String::from_utf8_lossy(path);
        let text = text.strip_prefix("usr/").unwrap_or(&text);
        if let Some(found) = text.strip_prefix("boot/vmlinuz-") {
            let packed = files::read_bounded(blob, MAX_IMAGE)?;
            let place = work.join(KERNEL_FILE);
            let image = kernel::extract(&packed, Path::new(text))?;
            fs::write(&place, image).attempt(|| format!("writing {}", place.display()))?;
            release = Some(found.to_owned());
        } else if let Some((_, rest)) =
            text.strip_prefix("lib/modules/").and_then(|rest| rest.split_once('/'))
        {
            // Names in a tree have no "..", so this stays below.
            let place = work.join("modules").join(rest);
            files::make_dir(place.parent().unwrap_or(work))?;
            fs::rename(blob, &place).attempt(|| format!("moving {}", place.display()))?;
        }
    }
    let release = release.ok_or_else(|| wrong("has no /boot/vmlinuz-RELEASE"))?;
    if !work.join("modules/modules.builtin").is_file() {
        return Err(wrong("has no /lib/modules/RELEASE"));
    }
    fs::write(work.join("release"), release).attempt(|| format!("writing to {}", work.display()))
}

fn write(work: &Path, name: &str, content: &[u8]) -> Result<FileEntry> {
    let path = work.join(name);
    fs::write(&path, content).attempt(|| format!("writing {}", path.display()))?;
    Ok(FileEntry {
        file: name.to_owned(),
        bytes: content.len() as u64,
        blake3: Blake3::of(content),
    })
}

/// What the guest runs: the image's wishes, overruled by the recipe's.
fn guest_config(recipe: &Recipe, image: &ImageDefaults) -> Result<MachineConfig> {
    let entry = &recipe.entry;
    let mut config = MachineConfig::new(entry.argv.clone().unwrap_or_else(|| image.argv.clone()));
    config.env = image.env.clone();
    config.env.extend(entry.env.clone());
    if let Some(dir) = entry.working_dir.clone().or_else(|| image.working_dir.clone()) {
        config.working_dir = dir;
    }
    config.user = entry.user.clone().or_else(|| image.user.clone()).unwrap_or_default();
    config.restart = entry.restart.clone();
    config.at_end = entry.at_end;
    if let Some(limit) = entry.stop_timeout_ms {
        config.stop_timeout = std::time::Duration::from_millis(limit);
    }
    config.hooks = entry.hooks.clone();
    config.probes = entry.probes.clone();
    config.check().map_err(|error| PackageError::Request {
        name: recipe.name.clone(),
        problem: error.to_string(),
    })?;
    Ok(config)
}

/// A program that is not in the root is found now and not at the first boot.
fn check_program(tree: &Tree, config: &MachineConfig, recipe: &Recipe) -> Result<()> {
    let Some(program) = config.argv.first() else { return Ok(()) };
    let path = config.env.get("PATH").map_or(drafter_guest::config::DEFAULT_PATH, String::as_str);
    let is_file = |path: &str| {
        tree.lookup(path.as_bytes()).is_some_and(|inode| {
            matches!(inode.kind, Kind::File { .. }) && inode.meta.mode & 0o111 != 0
        })
    };
    let found = if program.contains('/') {
        // A relative path begins at the working directory.
        let begin = if program.starts_with('/') { "" } else { config.working_dir.as_str() };
        // Its ".." are for the guest to follow; what cannot be checked here is let through.
        program.contains("..") || is_file(&format!("{begin}/{program}"))
    } else {
        path.split(':').any(|dir| is_file(&format!("{dir}/{program}")))
    };
    if found {
        return Ok(());
    }
    Err(PackageError::Request {
        name: recipe.name.clone(),
        problem: format!("its entry point {program:?} is not an executable file in the root"),
    })
}

fn ports(recipe: &Recipe, image: &ImageDefaults) -> Vec<Port> {
    if recipe.ports.is_empty() { image.ports.clone() } else { recipe.ports.clone() }
}

fn sources(inputs: &Inputs<'_>) -> Vec<Source> {
    let deb = |deb: &Deb| Source::Deb {
        name: deb.name.clone(),
        version: deb.version.clone(),
        sha256: deb.sha256.clone(),
    };
    let files = |name: &str, blake3: Blake3| Source::Files { name: name.to_owned(), blake3 };
    let mut all = vec![files("guest program", inputs.guest_program)];
    match &inputs.kernel {
        KernelInput::Deb(kernel) => all.push(deb(kernel)),
        KernelInput::Files { image, modules, .. } => {
            all.push(files("kernel", *image));
            all.push(files("modules", *modules));
        }
    }
    match &inputs.root {
        RootInput::Debs(debs) => all.extend(debs.iter().map(deb)),
        RootInput::Directory(hash) => all.push(files("root", *hash)),
        RootInput::Oci { digest } => all.push(Source::Oci { digest: digest.clone() }),
    }
    let added = inputs.recipe.files.iter().zip(&inputs.files);
    all.extend(added.map(|(file, hash)| files(&file.to, *hash)));
    all.sort();
    all
}

fn sorted(names: &[String]) -> Vec<String> {
    let mut names = names.to_vec();
    names.sort();
    names.dedup();
    names
}
