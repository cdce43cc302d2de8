//! The one binary inside a machine: `/init` of the initramfs, process 1 of the root, and its agent.
//!
//! Which one it is follows from how it is started; see [`drafter_guest::init`].

use drafter_guest::{agent, init};
use std::{io::Write, process::ExitCode};

const HELP: &str = "\
drafter-guest: init and agent of a machine.

Nobody starts this by hand: a machine's kernel runs it as /init and then as process 1 of the root,
and that runs `drafter-guest agent`. It speaks with its host over the virtio-serial port
\"drafter.agent\".
";

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let first = arguments.get(1).map(String::as_str);
    if std::process::id() == 1 {
        // The kernel passes on words of its command line, so arguments mean nothing here.
        let in_initramfs = arguments.first().is_some_and(|name| name == "/init");
        if in_initramfs { init::initramfs::main() } else { init::main() }
    }
    let mut out = std::io::stdout();
    match first {
        Some(init::AGENT_ARGUMENT) => agent::main(),
        Some("--version" | "-V") => {
            let _ = writeln!(out, "drafter-guest {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("--help" | "-h") => {
            let _ = out.write_all(HELP.as_bytes());
            ExitCode::SUCCESS
        }
        _ => {
            let _ = std::io::stderr().write_all(HELP.as_bytes());
            ExitCode::from(2)
        }
    }
}
