//! Compiles the BPF programs with clang and writes the names of events for Rust.

use std::{env, fmt::Write, fs, path::PathBuf, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CONDUIT_CLANG");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let clang = env::var("CONDUIT_CLANG").unwrap_or_else(|_| "clang".into());
    // linux/types.h includes asm/types.h, which Debian keeps by architecture.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets the architecture");
    #[rustfmt::skip]
    let result = Command::new(&clang)
        .args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-std=gnu11", "-Wall", "-Wextra", "-Werror"])
        .arg(format!("-I/usr/include/{arch}-linux-gnu"))
        .args(["-c", "bpf/conduit.bpf.c", "-o"])
        .arg(out.join("conduit.bpf.o"))
        .status();
    match result {
        Ok(status) if status.success() => {}
        Ok(status) => panic!(
            "{clang} could not compile bpf/conduit.bpf.c ({status}); its messages stand above. \
             It needs the kernel's headers (Debian: apt install linux-libc-dev)"
        ),
        Err(error) => panic!(
            "{clang} does not run ({error}): the BPF programs are compiled with clang, 14 or newer \
             (Debian: apt install clang; another name: set CONDUIT_CLANG)"
        ),
    }
    fs::write(out.join("events.rs"), events()).expect("OUT_DIR can be written");
}

/// An enum with one variant for each EVENT line of bpf/events.h, in order.
fn events() -> String {
    let source = fs::read_to_string("bpf/events.h").expect("bpf/events.h is there");
    let (mut variants, mut all, mut names, mut texts, mut drops) =
        (String::new(), String::new(), String::new(), String::new(), String::new());
    for line in source.lines().filter_map(|l| l.strip_prefix("EVENT(")) {
        let mut parts = line.trim_end_matches(')').splitn(3, ", ");
        let mut part = || parts.next().expect("EVENT(name, drop, \"text\")");
        let (name, drop, text) = (part(), part(), part());
        let variant: String =
            name.split('_').map(|word| word[..1].to_uppercase() + &word[1..]).collect();
        let about = text.trim_matches('"');
        let mut first = about.chars();
        let capital = first.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
        let rest = first.as_str();
        writeln!(variants, "    /// {capital}{rest}.\n    {variant},").expect("a string takes it");
        write!(all, "Event::{variant}, ").expect("a string takes it");
        write!(names, "Event::{variant} => \"{name}\", ").expect("a string takes it");
        write!(texts, "Event::{variant} => {text}, ").expect("a string takes it");
        if drop == "1" {
            write!(drops, "{}Event::{variant}", if drops.is_empty() { "" } else { " | " })
                .expect("a string takes it");
        }
    }
    format!(
        "/// What the programs count; made from `bpf/events.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Event {{
{variants}}}

impl Event {{
    /// All, in the order of their counters.
    pub const ALL: &[Event] = &[{all}];

    /// Its name, as metrics and commands show it.
    #[must_use]
    pub fn name(self) -> &'static str {{
        match self {{ {names} }}
    }}

    /// What it means.
    #[must_use]
    pub fn about(self) -> &'static str {{
        match self {{ {texts} }}
    }}

    /// Whether a frame ended here.
    #[must_use]
    pub fn is_drop(self) -> bool {{
        matches!(self, {drops})
    }}
}}
"
    )
}
