//! Commands that look on: `conduit map`, `flows` and `trace`. They read what is pinned for this
//! network namespace themselves, so that they work while no agent or edge runs, and ask the one that
//! does for the names of machines and hosts.
//!
//! Each has its figures as plain structs, which `--json` prints and people get as columns.

mod conversation;
mod flows;
mod map;
mod names;
mod trace;

pub use flows::FlowsArgs;
pub use map::MapArgs;
pub use trace::TraceArgs;

pub(crate) use flows::run as flows;
pub(crate) use map::run as map;
pub(crate) use names::find_status;
pub(crate) use trace::run as trace;

use std::{
    io::{self, Write},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

/// Where to look.
#[derive(Clone, Debug, clap::Args)]
pub struct Where {
    /// The socket of an agent or edge, for names; the agent here, else the edge here, if not given.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Where the data path is pinned.
    #[arg(long, value_name = "DIR", default_value = conduit_bpf::ROOT)]
    pub pins: PathBuf,
    /// Print JSON, one object a line.
    #[arg(long)]
    pub json: bool,
}

/// Set by SIGINT and SIGTERM: what was begun is ended in order.
struct Interrupted(Arc<AtomicBool>);

impl Interrupted {
    fn watch() -> io::Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, flag.clone())?;
        }
        Ok(Self(flag))
    }

    fn yet(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn json_line(out: &mut dyn Write, value: &impl serde::Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// The name of an IP protocol, or its number.
fn protocol_name(protocol: u8) -> String {
    match protocol {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmp6".into(),
        other => other.to_string(),
    }
}

/// Reads what [`protocol_name`] writes.
fn protocol_number(text: &str) -> Result<u8, String> {
    match text {
        "icmp" => Ok(1),
        "tcp" => Ok(6),
        "udp" => Ok(17),
        "icmp6" => Ok(58),
        other => other.parse().map_err(|_| {
            format!("\"{other}\" is neither tcp, udp, icmp, icmp6 nor the number of an IP protocol")
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_is_read_as_it_is_written() {
        for protocol in [1, 6, 17, 58, 47] {
            assert_eq!(protocol_number(&protocol_name(protocol)), Ok(protocol));
        }
        let error = protocol_number("tpc").unwrap_err();
        assert!(error.contains("\"tpc\"") && error.contains("udp"), "{error}");
        assert!(protocol_number("256").is_err());
    }
}
