//! What speaks against taking a machine that asks to come; said to its source before anything is built.

use crate::{driver::HostFacts, migrate::messages::PrepareRequest, package::Package};
use silo::block::BLOCK_SIZE;

/// Why an arriving machine cannot be taken here; empty if it can. `package` is what was found of
/// the package that it needs.
pub(in crate::runner) fn objections(
    request: &PrepareRequest,
    name: &str,
    facts: &HostFacts,
    package: Option<&Package>,
) -> Vec<String> {
    let mut reasons = Vec::new();
    if request.shape.name != name {
        reasons
            .push(format!("this runner waits for \"{name}\", not for \"{}\"", request.shape.name));
    }
    if let Err(mut why) = crate::driver::compatible(&request.facts, &request.shape, facts) {
        reasons.append(&mut why);
    }
    match package {
        None => reasons.push(format!(
            "package \"{}\" ({}) is not here; give it to the runner with --package",
            request.package_name, request.package
        )),
        Some(package) => {
            let bases: Vec<Option<String>> =
                package.manifest().devices.iter().map(|d| Some(d.blake3.to_string())).collect();
            let told: Vec<Option<String>> =
                request.devices.iter().skip(1).map(|d| d.base.clone()).collect();
            if bases != told {
                reasons.push("its disks' bases are not those of its package".into());
            }
        }
    }
    let memory = request.devices.first();
    let fits = memory.is_some_and(|d| {
        d.name == "memory" && d.blocks * BLOCK_SIZE as u64 == request.shape.memory_bytes
    });
    if !fits || request.devices.len() != request.shape.disks.len() + 1 {
        reasons.push("its device group is not one memory and its disks".into());
    }
    if let Some(free) = free_memory()
        && free < request.shape.memory_bytes
    {
        reasons.push(format!(
            "it has {} MiB of memory, this host has {} MiB available",
            request.shape.memory_bytes >> 20,
            free >> 20
        ));
    }
    reasons
}

/// MemAvailable of /proc/meminfo, in bytes.
pub(crate) fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
