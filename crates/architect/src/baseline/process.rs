//! A stock QEMU as a child process in a network namespace.

use super::{BaselineError, Guest, Side};
use nix::sched::{CloneFlags, setns};
use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

pub(super) struct Process {
    side: String,
    child: Child,
    socket: PathBuf,
    console: PathBuf,
    errors: PathBuf,
}

/// The command line, program name apart. What the guest sees is the same for every generation.
pub(super) fn arguments(
    guest: &Guest,
    socket: &Path,
    console: &Path,
    side: &Side,
) -> Vec<OsString> {
    let with = |prefix: &str, path: &Path, suffix: &str| {
        let mut word = OsString::from(prefix);
        word.push(path);
        word.push(suffix);
        word
    };
    let words = format!(
        "-accel {} -nodefaults -no-user-config -no-reboot -display none -cpu max -smp {} -m {} \
         -M microvm,x-option-roms=off,isa-serial=on,rtc=on,pcie=on",
        guest.accelerator, guest.vcpus, guest.memory_mib
    );
    let mut all: Vec<OsString> = words.split_whitespace().map(OsString::from).collect();
    all.extend([
        "-kernel".into(),
        guest.kernel.clone().into(),
        "-initrd".into(),
        guest.initramfs.clone().into(),
        "-append".into(),
        guest.command_line.clone().into(),
        "-serial".into(),
        with("file:", console, ""),
        "-qmp".into(),
        with("unix:", socket, ",server=on,wait=off"),
    ]);
    all.extend(side.arguments.iter().cloned());
    all
}

impl Process {
    pub(super) fn start(
        guest: &Guest,
        side: &Side,
        generation: u32,
        more: &[OsString],
    ) -> Result<Process, BaselineError> {
        let fail = |source| BaselineError::Start { side: side.name.clone(), source };
        fs::create_dir_all(&side.folder).map_err(fail)?;
        let path = |kind: &str| side.folder.join(format!("{}-{generation}.{kind}", side.name));
        let (socket, console, errors) = (path("qmp"), path("console"), path("errors"));
        if let Err(error) = fs::remove_file(&socket)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(fail(error));
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(arguments(guest, &socket, &console, side))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors).map_err(fail)?);
        let child = spawn_in(side.namespace.as_deref(), &mut command).map_err(fail)?;
        Ok(Process { side: side.name.clone(), child, socket, console, errors })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn console_log(&self) -> &Path {
        &self.console
    }

    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// The error of a command, with what QEMU itself had to say.
    pub(super) fn refused(&self, command: &str, detail: String) -> BaselineError {
        let text = fs::read(&self.errors).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let words: Vec<_> = text.lines().rev().take(3).collect();
        let words = words.into_iter().rev().collect::<Vec<_>>().join(" / ");
        BaselineError::Refused {
            side: self.side.clone(),
            command: command.to_owned(),
            detail,
            words: if words.is_empty() { "none".into() } else { words },
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Errors mean that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Spawns from a thread that has entered the namespace, so that this one stays where it is.
fn spawn_in(namespace: Option<&Path>, command: &mut Command) -> io::Result<Child> {
    let Some(namespace) = namespace else { return command.spawn() };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let name = |error: io::Error| {
                io::Error::new(error.kind(), format!("namespace {}: {error}", namespace.display()))
            };
            let file = File::open(namespace).map_err(name)?;
            setns(file, CloneFlags::CLONE_NEWNET).map_err(|error| name(error.into()))?;
            command.spawn()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the spawning thread panicked")))
    })
}
