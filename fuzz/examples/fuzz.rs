//! One program for all targets: the environment variable `FUZZ_TARGET` says which decoder gets the
//! bytes, `FUZZ_LIST=1` lists them.

#![no_main]

use fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static CHOSEN: LazyLock<Target> = LazyLock::new(|| {
    let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
    if std::env::var_os("FUZZ_LIST").is_some() {
        TARGETS.iter().for_each(|(name, _)| println!("{name}"));
        std::process::exit(0);
    }
    let found = TARGETS.iter().find(|(name, _)| *name == wanted);
    let Some((_, target)) = found else {
        eprintln!("FUZZ_TARGET is \"{wanted}\"; FUZZ_LIST=1 lists the targets");
        std::process::exit(2);
    };
    *target
});

fuzz_target!(|bytes: &[u8]| CHOSEN(bytes));
