//! Where the build put our own programs: the commands, and the static ones for guests.
//!
//! The demonstration, the benchmarks and the end-to-end tests start programs of this build and of no
//! other, so they are looked for from the place of the running program and never in `PATH`.

use std::path::{Path, PathBuf};

/// Where guests' programs are, seen from a command's folder: as installed, and as the build leaves
/// them (`target/debug` next to `target/TRIPLE/guest`, see scripts/build.sh).
const GUEST_FOLDERS: [&str; 2] = ["guest", "../x86_64-unknown-linux-gnu/guest"];

/// One of our commands: in the folder of this program, or one above it, where the tests' commands are.
#[must_use]
pub fn command(name: &str) -> Option<PathBuf> {
    let this = std::env::current_exe().ok()?;
    folders(&this).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// The static program that runs inside guests and checks their memory and files.
#[must_use]
pub fn oracle() -> Option<PathBuf> {
    let this = std::env::current_exe().ok()?;
    guest_program(&this, "oracle")
}

fn folders(program: &Path) -> impl Iterator<Item = &Path> {
    program.ancestors().skip(1).take(2)
}

fn guest_program(this: &Path, name: &str) -> Option<PathBuf> {
    folders(this)
        .flat_map(|folder| GUEST_FOLDERS.map(|guest| folder.join(guest).join(name)))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_guests_program_is_found_from_a_command_and_from_a_test_of_the_same_build() {
        let target = tempfile::tempdir().unwrap();
        let guest = target.path().join("x86_64-unknown-linux-gnu/guest");
        fs::create_dir_all(target.path().join("debug/deps")).unwrap();
        fs::create_dir_all(&guest).unwrap();
        fs::write(guest.join("oracle"), "").unwrap();
        for this in ["debug/architect", "debug/deps/life-0123456789abcdef"] {
            let found = guest_program(&target.path().join(this), "oracle").expect(this);
            assert!(found.is_file());
        }
        assert_eq!(guest_program(&target.path().join("debug/architect"), "absent"), None);
    }
}
