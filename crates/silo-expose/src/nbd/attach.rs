//! The kernel's own NBD client, through Debian's `nbd-client`: an export as `/dev/nbdN`.
//!
//! The kernels that this is developed on have no NBD: the refusal is tested, and the arguments
//! against the program's own parser. `scripts/kernel-vm.sh` makes a device node in a virtual
//! machine.

use super::{Endpoint, NbdError};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// How an export is attached.
#[derive(Clone, Debug)]
pub struct Attach {
    /// The server. Without TLS: the kernel speaks none.
    pub endpoint: Endpoint,
    /// The export.
    pub export: String,
    /// The node, as in `/dev/nbd0`.
    pub node: PathBuf,
    /// Connections, if the server allows more than one.
    pub connections: usize,
}

impl Attach {
    fn arguments(&self) -> Vec<String> {
        let mut arguments = match &self.endpoint {
            Endpoint::Unix(path) => vec!["-unix".to_owned(), path.display().to_string()],
            Endpoint::Tcp(address) => vec![address.ip().to_string(), address.port().to_string()],
        };
        arguments.push(self.node.display().to_string());
        arguments.extend(["-name".to_owned(), self.export.clone()]);
        if self.connections > 1 {
            arguments.extend(["-connections".to_owned(), self.connections.to_string()]);
        }
        // Survives memory pressure, and gives up on a silent server.
        arguments.extend(["-swap", "-timeout", "60"].map(str::to_owned));
        arguments
    }
}

/// Attaches an export to a node of the kernel's. Needs root and the kernel's `nbd`.
///
/// # Errors
/// Says what is missing: the module, the program, the node, or the right to use it.
pub fn attach(what: &Attach) -> Result<(), NbdError> {
    let node = what.node.display().to_string();
    let failed = |reason| NbdError::Kernel { operation: "attach", node: node.clone(), reason };
    let name = what.node.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !is_node_name(&name) || what.node.parent() != Some(Path::new("/dev")) {
        return Err(failed("a node of the kernel's is /dev/nbd0, /dev/nbd1, …".to_owned()));
    }
    let has_module = Path::new("/sys/module/nbd").exists() || {
        // It may only need to be loaded. Whether that worked is seen by its result.
        drop(Command::new("modprobe").arg("nbd").output());
        Path::new("/sys/module/nbd").exists()
    };
    if !has_module {
        return Err(failed(
            "this kernel has no nbd (CONFIG_BLK_DEV_NBD): use a mount, FUSE or vhost-user-blk"
                .to_owned(),
        ));
    }
    let held = fs::read_to_string(format!("/sys/block/{name}/pid"));
    if let Ok(pid) = held {
        return Err(failed(format!("process {} has it; detach it first", pid.trim())));
    }
    run(&what.arguments()).map_err(failed)
}

/// Lets go of a node. What was written through the kernel is flushed by it first.
///
/// # Errors
/// If the program is missing or refuses.
pub fn detach(node: &Path) -> Result<(), NbdError> {
    let text = node.display().to_string();
    run(&["-d".to_owned(), text.clone()]).map_err(|reason| NbdError::Kernel {
        operation: "detach",
        node: text.clone(),
        reason,
    })
}

fn is_node_name(name: &str) -> bool {
    let number = name.strip_prefix("nbd").unwrap_or_default();
    !number.is_empty() && number.len() <= 4 && number.bytes().all(|byte| byte.is_ascii_digit())
}

fn run(arguments: &[String]) -> Result<(), String> {
    // Debian has it where only root looks.
    let program = ["/usr/sbin/nbd-client", "/sbin/nbd-client"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap_or("nbd-client");
    let output: Output = Command::new(program).args(arguments).output().map_err(|error| {
        format!("cannot run {program} ({error}); install the package nbd-client")
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
    Err(format!("{program} failed ({}): {last}", output.status))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_client_is_told_everything_on_its_command_line() {
        let mut what = Attach {
            endpoint: Endpoint::unix(Path::new("/run/s")),
            export: "root".to_owned(),
            node: "/dev/nbd7".into(),
            connections: 1,
        };
        assert_eq!(
            what.arguments().join(" "),
            "-unix /run/s /dev/nbd7 -name root -swap -timeout 60"
        );
        what.endpoint = Endpoint::Tcp(([10, 0, 0, 1], 10809).into());
        what.connections = 4;
        assert_eq!(
            what.arguments().join(" "),
            "10.0.0.1 10809 /dev/nbd7 -name root -connections 4 -swap -timeout 60"
        );
    }

    #[test]
    fn what_cannot_be_attached_is_refused_with_the_reason() {
        let what = Attach {
            endpoint: Endpoint::unix(Path::new("/run/s")),
            export: String::new(),
            node: "/dev/sda".into(),
            connections: 1,
        };
        let refused = attach(&what).unwrap_err().to_string();
        assert!(refused.contains("/dev/nbd0"), "{refused}");
        if Path::new("/sys/module/nbd").exists() {
            return;
        }
        let refused = attach(&Attach { node: "/dev/nbd0".into(), ..what }).unwrap_err().to_string();
        assert!(refused.contains("this kernel has no nbd"), "{refused}");
    }
}
