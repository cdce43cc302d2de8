//! Which QEMU is installed here. It is asked once: to start it for that takes 20 ms, which a machine that
//! wakes or arrives would wait. The answer is kept for as long as the program's file is the same one.

use super::{kept, probe};
use crate::driver::DriverError;
use std::{
    fs::File,
    io::{self, Read as _, Seek as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The file that keeps the answer, in the driver's state directory.
const FILE: &str = "qemu-version.json";
/// How long the program may take to say it.
const LIMIT: Duration = Duration::from_secs(20);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(2);
/// Most bytes of its answer that are read.
const MOST: u64 = 4096;

/// Which file a program is. A package that is upgraded brings another one; one that is written in place
/// has another time of its last change, which nobody can set.
#[derive(Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl Identity {
    /// `None` for what is no program itself: a script may start another one from one day to the next.
    fn of(path: &Path) -> io::Result<Option<Self>> {
        let mut file = File::open(path)?;
        let mut magic = [0; 4];
        if file.read_exact(&mut magic).is_err() || &magic != b"\x7fELF" {
            return Ok(None);
        }
        let meta = file.metadata()?;
        Ok(Some(Self {
            path: path.to_owned(),
            device: meta.dev(),
            inode: meta.ino(),
            bytes: meta.size(),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }))
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Kept {
    identity: Identity,
    version: String,
}

/// The path of the QEMU program and its version, as in "7.2.22": as it is kept in `state_dir`, or from
/// itself.
pub(super) fn installed(binary: &Path, state_dir: &Path) -> Result<(PathBuf, String), DriverError> {
    let path = probe::program(binary)?;
    let identity = Identity::of(&path).ok().flatten();
    let place = state_dir.join(FILE);
    if let Some(identity) = &identity
        && let Some(known) = kept::read::<Kept>(&place).filter(|known| known.identity == *identity)
    {
        return Ok((path, known.version));
    }
    let version = asked(&path, LIMIT)?;
    if let Some(identity) = identity
        && let Err(error) = kept::write(&place, &Kept { identity, version: version.clone() })
    {
        tracing::debug!(file = %place.display(), %error, "the version of QEMU is not kept");
    }
    Ok((path, version))
}

/// What the program itself says.
fn asked(path: &Path, limit: Duration) -> Result<String, DriverError> {
    let unusable = |why: String| DriverError::Unusable {
        what: format!("{} cannot be used: {why}", path.display()),
        hint: "install QEMU (apt-get install qemu-system-x86)".into(),
    };
    let failed = |error: io::Error| unusable(error.to_string());
    // A file, which is never full and has no other end that somebody could keep open.
    let mut said = tempfile::tempfile().map_err(failed)?;
    let mut child = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(said.try_clone().map_err(failed)?)
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let end = Instant::now() + limit;
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() >= end => {
                child.kill().and_then(|()| child.wait()).map_err(failed)?;
                return Err(unusable(format!("--version says nothing within {limit:?}")));
            }
            None => std::thread::sleep(LOOK),
        }
    };
    let mut text = Vec::new();
    said.rewind().and_then(|()| said.take(MOST).read_to_end(&mut text)).map_err(failed)?;
    let text = String::from_utf8_lossy(&text);
    // "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    let version = text.split_ascii_whitespace().skip_while(|word| *word != "version").nth(1);
    match version {
        Some(version) if status.success() && text.starts_with("QEMU") => Ok(version.to_owned()),
        _ => Err(unusable(format!("--version says {:?}", text.lines().next().unwrap_or_default()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_version_is_kept_for_the_same_file_only() {
        let state = tempfile::tempdir().unwrap();
        let qemu = probe::program(Path::new("qemu-system-x86_64")).unwrap();
        let version = |binary: &Path| installed(binary, state.path()).map(|(_, version)| version);
        let asked = version(&qemu).unwrap();
        let place = state.path().join(FILE);
        let mut known: Kept = kept::read(&place).unwrap();
        assert_eq!(known.version, asked);
        known.version = "kept".into();
        kept::write(&place, &known).unwrap();
        assert_eq!(version(&qemu).unwrap(), "kept");

        known.identity.changed.1 += 1;
        kept::write(&place, &known).unwrap();
        assert_eq!(version(&qemu).unwrap(), asked, "another file may be another version");
        fs::write(&place, "{").unwrap();
        assert_eq!(version(&qemu).unwrap(), asked, "a broken file is made anew");
    }

    #[test]
    fn a_script_is_asked_each_time() {
        let state = tempfile::tempdir().unwrap();
        let script = state.path().join("qemu");
        for version in ["1.2.3", "1.2.4"] {
            let text = format!("#!/bin/sh\necho QEMU emulator version {version}\n");
            fs::write(&script, text).unwrap();
            let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(&script, all).unwrap();
            assert_eq!(installed(&script, state.path()).unwrap().1, version);
        }
        assert!(!state.path().join(FILE).exists());
    }

    #[test]
    fn a_program_that_hangs_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("qemu");
        fs::write(&script, "#!/bin/sh\nexec sleep 60\n").unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let error = asked(&script, Duration::from_millis(100)).unwrap_err().to_string();
        assert!(error.contains("within 100ms") && error.contains("apt-get"), "{error}");
    }

    #[test]
    fn a_qemu_that_is_not_there_is_named_with_the_package() {
        let state = tempfile::tempdir().unwrap();
        let why = |binary| installed(Path::new(binary), state.path()).unwrap_err().to_string();
        let error = why("/nonexistent/qemu");
        assert!(error.contains("/nonexistent/qemu") && error.contains("apt-get"), "{error}");
        assert!(why("/bin/true").contains("--version"));
        assert!(!state.path().join(FILE).exists());
    }
}
