//! The oracle: runs inside a guest under test and knows what its memory and disk must hold.
//!
//! `oracle run` writes self-describing pages over a part of memory and a file, at a set rate, and
//! re-reads them all the time: a lost, stale, swapped, torn or doubled write shows as a mismatch.
//! `oracle status` and `oracle verify` ask it over a unix socket. `oracle outbound` keeps a TCP
//! connection that the guest has begun; `oracle slowdown` measures how much of the processor a
//! guest got. Tests start it by the guest channel and read its JSON.
//!
//! What must hold: it never reports a mismatch that is none. So it judges by its own table of
//! generations, never by clocks, and one thread both writes and checks the pages.

mod args;
mod control;
mod file;
mod flows;
mod memory;
mod outbound;
mod pace;
mod page;
mod report;
mod run;
mod slowdown;
mod sys;

use args::Args;
use std::{io::Write, process::ExitCode};

const HELP: &str = "\
oracle: knows what a guest's memory and disk must hold, and checks it

  oracle run [--memory-mib N] [--hot-mib H] [--rate-mb-s R] [--check-mb-s C]
             [--file PATH --file-mib M [--file-writes-s W]] [--socket S] [--background]
        Writes N MiB of self-describing pages, rewrites pages of the first H MiB at R MB/s, and
        checks all of them at C MB/s; the same for a file of M MiB, W blocks a second, each
        synced and read back from the disk. --background returns when it is up.
  oracle status | verify | pause-writes | resume-writes | stop  [--socket S]
        Asks a running oracle; prints JSON. verify makes one complete pass over pages and file.
        The exit status is 1 if anything was ever wrong.
  oracle outbound --to IP:PORT [--interval-ms I] [--socket S] [--background]
        Sends numbers over one TCP connection and expects each back. Ask it with
        --socket /run/oracle-outbound.sock (its default).
  oracle echo --listen IP:PORT
        The other end of outbound.
  oracle answer --listen IP:PORT [--socket S] [--background]
        Sends every datagram back. Asked with --socket /run/oracle-answer.sock.
  oracle sink --listen IP:PORT [--socket S] [--background]
        Takes streams to their end. Asked with --socket /run/oracle-sink.sock.
  oracle download --from IP:PORT [--socket S] [--background]
        Takes one stream to its end and hashes it. Asked with --socket /run/oracle-download.sock.
  oracle slowdown [--seconds T] [--slice-ms L]
        Spins for T seconds; prints how much of its fastest speed it reached in each slice.
";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let result = Args::parse(words).and_then(|args| match command.as_str() {
        "run" => run::run(args),
        "status" | "verify" | "pause-writes" | "resume-writes" | "stop" => {
            control::ask(&command, args)
        }
        "outbound" => outbound::run(args),
        "echo" => outbound::echo(args),
        "answer" => flows::answer(args),
        "sink" => flows::sink(args),
        "download" => flows::download(args),
        "slowdown" => slowdown::run(args),
        "help" | "--help" | "-h" => {
            print(HELP);
            Ok(ExitCode::SUCCESS)
        }
        other => Err(format!("no command \"{other}\"; see oracle --help")),
    });
    result.unwrap_or_else(|problem| {
        let _ = writeln!(std::io::stderr(), "oracle: {problem}");
        ExitCode::from(2)
    })
}

/// Writes to standard output; a reader that has gone is no error of ours.
fn print(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
