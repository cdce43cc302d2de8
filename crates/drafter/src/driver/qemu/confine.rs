//! Walls around a machine's monitor: namespaces of its own, and a root in which there is only what QEMU
//! needs to run.
//!
//! ```text
//! /                     a tmpfs, read-only
//! ├── usr/bin/qemu-…    the program; the folders of its libraries and of its firmware beside it
//! ├── etc/ld.so.cache
//! ├── dev/              null, urandom; kvm where the machine uses it
//! ├── proc/             of its own process namespace, only processes
//! └── disks/0, 1, …     folders in which the servers of its disks listen, and nothing else is
//! ```
//!
//! | namespace | so that QEMU |
//! |---|---|
//! | mount | finds no other file of the host, and can write none: everything is mounted read-only |
//! | process | sees and signals no other process; the runner knows it by the host's number as ever |
//! | network | has no network: its tap came by descriptor, the sockets that it connects to are files |
//! | IPC, host name, control group | shares no queue and no segment, learns no name and no path |
//!
//! Namespaces belong to a thread, so they are made by one that starts QEMU and ends. All that was mounted
//! is in the mount namespace alone: it goes with the last process in it, however that ends, and nothing
//! is left to clean up. What only QEMU's own process can do (`/proc`, which shows the namespace of who
//! mounts it) is in [`sys`](super::sys), between fork and exec.
//!
//! Only root can do this. Who is not, or is not allowed to by a container, starts machines without these
//! walls, and says so: in the log, in `qemu.json`, and in `drafter status`.

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::{chdir, pivot_root, sethostname},
};
use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
    thread,
};

/// Folders with libraries, modules and firmware, as distributions have them. What is not there is left out.
const FOLDERS: [&str; 9] = [
    "/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/local/lib/x86_64-linux-gnu",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/local/share/qemu",
    "/usr/share/qemu-kvm",
];
const FILES: [&str; 1] = ["/etc/ld.so.cache"];
const DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];
const KVM: &str = "/dev/kvm";
/// Where the disks' folders are.
const DISKS: &str = "disks";

/// The host's name, as a monitor has it.
const NAME: &str = "monitor";
/// For what is on the tmpfs itself: names of folders and empty files.
const ROOT_OPTIONS: &str = "size=256k,nr_inodes=512,mode=0755";

/// Why there are no walls where it is known beforehand.
pub(super) const ORDINARY_USER: &str = "only root can make namespaces, and the runner is not root";

/// What a monitor needs of its host.
pub(super) struct Needs {
    /// The program, where it really is.
    pub(super) binary: PathBuf,
    pub(super) kvm: bool,
    /// Folders of sockets that it connects to.
    pub(super) disks: Vec<PathBuf>,
    /// A folder of ours that is empty: where the new root is mounted before it is one.
    pub(super) place: PathBuf,
}

/// The folder of disk `index`, as a monitor within walls sees it.
pub(super) fn disk_folder(index: usize) -> PathBuf {
    Path::new("/").join(DISKS).join(index.to_string())
}

/// Calls `start` in a thread that has these walls around it, and so has every process that it starts;
/// or here if there can be none. Tells `start` which, and the caller why not.
pub(super) fn within<T: Send>(
    needs: Result<&Needs, String>,
    start: impl FnOnce(bool) -> T + Send,
) -> (T, Option<String>) {
    let needs = match needs {
        Ok(needs) => needs,
        Err(why) => return (start(false), Some(why)),
    };
    let in_thread = || match build(needs) {
        Ok(()) => Ok(start(true)),
        Err(why) => Err((start, why)),
    };
    match thread::scope(|scope| scope.spawn(in_thread).join()) {
        Ok(Ok(value)) => (value, None),
        Ok(Err((start, why))) => (start(false), Some(why)),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Leaves this thread in namespaces of its own, on the new root.
fn build(needs: &Needs) -> Result<(), String> {
    let place = &needs.place;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(place)
        .map_err(|error| format!("making {}: {error}", place.display()))?;
    // The process namespace is that of this thread's children; the control group's is made by the child,
    // once it is in its group.
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    unshare(all).map_err(|errno| format!("making namespaces: {errno}"))?;
    sethostname(NAME).map_err(|errno| format!("naming its host: {errno}"))?;
    // Nothing that is mounted here may appear outside.
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|errno| format!("making the mounts private: {errno}"))?;
    mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some(ROOT_OPTIONS))
        .map_err(|errno| format!("mounting a root at {}: {errno}", place.display()))?;

    let mut root = Root { place, shown: vec![] };
    for folder in FOLDERS {
        root.show_folder(Path::new(folder))?;
    }
    for file in FILES.iter().map(Path::new).filter(|file| file.exists()) {
        root.show_file(file, FIXED)?;
    }
    root.show_file(&needs.binary, FIXED)?;
    for device in DEVICES.into_iter().chain(needs.kvm.then_some(KVM)) {
        root.show_file(Path::new(device), FIXED_DEVICE)?;
    }
    for (index, folder) in needs.disks.iter().enumerate() {
        root.show(folder, &root.folder(&disk_folder(index))?, FIXED | MsFlags::MS_NOEXEC)?;
    }
    root.folder(Path::new("/proc"))?;
    root.enter()
}

/// What nobody may write to, and what makes nobody more than he is.
const FIXED: MsFlags = MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NODEV);
const FIXED_DEVICE: MsFlags =
    MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NOEXEC);

/// A root that is being furnished.
struct Root<'a> {
    place: &'a Path,
    /// Folders that are there.
    shown: Vec<PathBuf>,
}

impl Root<'_> {
    /// Where a path of the host will be.
    fn at(&self, path: &Path) -> PathBuf {
        self.place.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Makes a folder, and those above it.
    fn folder(&self, path: &Path) -> Result<PathBuf, String> {
        let there = self.at(path);
        let made = DirBuilder::new().recursive(true).mode(0o755).create(&there);
        made.map_err(|error| format!("making {} in the root: {error}", path.display()))?;
        Ok(there)
    }

    /// Shows a folder of the host under the same name. Where one above it is a link (`/lib` to `usr/lib`)
    /// it is a link here too, and the folder is shown where it really is.
    fn show_folder(&mut self, folder: &Path) -> Result<(), String> {
        let Ok(real) = fs::canonicalize(folder) else { return Ok(()) };
        let link = folder.ancestors().filter_map(|above| Some((above, fs::read_link(above).ok()?)));
        if let Some((above, target)) = link.last() {
            self.folder(above.parent().unwrap_or(Path::new("/")))?;
            match symlink(target, self.at(above)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(format!("linking {} in the root: {error}", above.display()));
                }
                _ => {}
            }
        }
        if self.shown.contains(&real) {
            return Ok(());
        }
        let there = self.folder(&real)?;
        self.show(&real, &there, FIXED)?;
        self.shown.push(real);
        Ok(())
    }

    /// Shows a file of the host under the same name.
    fn show_file(&self, file: &Path, with: MsFlags) -> Result<(), String> {
        if let Some(parent) = file.parent() {
            self.folder(parent)?;
        }
        let there = self.at(file);
        // Within a folder that is shown already it is there.
        if there.exists() {
            return Ok(());
        }
        File::create_new(&there)
            .map_err(|error| format!("making {} in the root: {error}", file.display()))?;
        self.show(file, &there, with)
    }

    /// Mounts what is at `path` without what is mounted below it.
    fn show(&self, path: &Path, there: &Path, with: MsFlags) -> Result<(), String> {
        let none = None::<&str>;
        mount(Some(path), there, none, MsFlags::MS_BIND, none)
            .and_then(|()| {
                let change = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | with;
                mount(none, there, none, change, none)
            })
            .map_err(|errno| format!("showing it {}: {errno}", path.display()))
    }

    /// Makes it the root, and lets go of the host's.
    fn enter(&self) -> Result<(), String> {
        let failed = |errno: nix::Error| format!("entering the new root: {errno}");
        let none = None::<&str>;
        let fixed = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | FIXED | MsFlags::MS_NOEXEC;
        chdir(self.place).map_err(failed)?;
        mount(none, ".", none, fixed, none).map_err(failed)?;
        // The old root is mounted over the new one, and taken away from there.
        pivot_root(".", ".").map_err(failed)?;
        umount2(".", MntFlags::MNT_DETACH).map_err(failed)?;
        chdir("/").map_err(failed)
    }
}
