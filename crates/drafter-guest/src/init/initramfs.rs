//! Process 1 of the initramfs: from the bare kernel to the machine's root.

use super::{mounts, power};
use crate::{
    config::{GUEST_BINARY_PATH, MODULES_DIR, MODULES_ORDER, ROOT_DEVICE},
    log::say,
    sys,
};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout},
};
use std::{
    convert::Infallible,
    fs::{File, OpenOptions},
    io,
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// How long the root device may take to appear. Its driver is loaded by then, so it is a matter
/// of milliseconds, or of nothing.
const ROOT_LIMIT: Duration = Duration::from_secs(30);

const NEW_ROOT: &str = "/newroot";

/// Unless it is told not to, ext4 reads the bitmaps of the whole disk in the background, some seconds after
/// it was mounted (Linux 5.13 and later; older ones do not know the word). A machine that is copied or put
/// to sleep soon after its boot would do so wherever it goes on, with blocks that nobody asked for.
const ROOT_OPTIONS: &str = "no_prefetch_block_bitmaps";

/// Loads modules, mounts the root device and becomes the machine's own init. A failure is told on
/// the console and ends the machine with a reset: nobody could repair it from here.
pub fn main() -> ! {
    mounts::mount_basic();
    use_console();
    load_modules(Path::new(MODULES_ORDER), Path::new(MODULES_DIR));
    let Err(problem) = switch_root();
    say!("{problem}");
    power::fail()
}

/// The kernel opens the console for us only if the initramfs has a node for it.
fn use_console() {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/console");
    if let Ok(console) = opened {
        let _ = dup2_stdin(&console);
        let _ = dup2_stdout(&console);
        let _ = dup2_stderr(&console);
    }
}

/// Loads the modules in order. One that fails is told and skipped: whether it was needed shows
/// when the root device does not appear.
fn load_modules(order: &Path, folder: &Path) {
    let list = std::fs::read_to_string(order).unwrap_or_else(|error| {
        say!("{}: {error}; no modules are loaded", order.display());
        String::new()
    });
    for name in names(&list) {
        let path = folder.join(name);
        if let Err(error) = File::open(&path).and_then(|file| sys::load_module(&file)) {
            say!("module {}: {error}", path.display());
        }
    }
}

/// The modules that a list names.
fn names(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn switch_root() -> Result<Infallible, String> {
    wait_for(Path::new(ROOT_DEVICE), ROOT_LIMIT).map_err(|error| {
        format!("{ROOT_DEVICE}: {error}; does {MODULES_ORDER} load the disk's driver?")
    })?;
    std::fs::create_dir_all(NEW_ROOT).map_err(|error| format!("{NEW_ROOT}: {error}"))?;
    let mount_root = |options: Option<&str>| {
        mount(Some(ROOT_DEVICE), NEW_ROOT, Some("ext4"), MsFlags::MS_NOATIME, options)
    };
    mount_root(Some(ROOT_OPTIONS))
        .or_else(|_| mount_root(None))
        .map_err(|error| format!("cannot mount {ROOT_DEVICE} as ext4: {error}"))?;
    for point in mounts::basic_points() {
        let target = format!("{NEW_ROOT}{point}");
        let _ = std::fs::create_dir_all(&target);
        mount(Some(point), target.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|error| format!("cannot move {point} to the new root: {error}"))?;
    }
    // What lies in the initramfs is memory that nobody frees later (and that would travel).
    let _ = std::fs::remove_dir_all(MODULES_DIR);
    let _ = std::fs::remove_file("/init");
    enter().map_err(|error| format!("cannot enter the new root: {error}"))?;
    let error = Command::new(GUEST_BINARY_PATH).env_clear().exec();
    Err(format!("{GUEST_BINARY_PATH}: {error}; the root lacks the guest binary, build it again"))
}

fn enter() -> Result<(), Errno> {
    chdir(NEW_ROOT)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")
}

fn wait_for(path: &Path, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    while !path.exists() {
        if Instant::now() >= deadline {
            let message = format!("did not appear within {limit:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, message));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_of_modules_skips_blank_lines_and_comments() {
        let list = "virtio.ko\n\n# network\n  virtio_net.ko \n";
        assert_eq!(names(list).collect::<Vec<_>>(), ["virtio.ko", "virtio_net.ko"]);
    }

    #[test]
    fn a_device_that_never_comes_ends_the_wait() {
        let error = wait_for(Path::new("/no/such/device"), Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(wait_for(Path::new("/dev/null"), Duration::ZERO).is_ok());
    }
}
