//! The commands that ask a daemon or the kernel, and print what they hear.

use super::{CheckArgs, DrainArgs, LookArgs};
use crate::{
    check, client, keys, look, probe,
    wire::{Ask, HomeStatus, Peer, Status},
};
use anyhow::Result;
use std::{io::Write, net::IpAddr};

pub(super) fn drain(args: &DrainArgs) -> Result<()> {
    let ask = Ask::Drain {
        to: args.to.to_string(),
        home: args.home.clone(),
        dry_run: args.dry_run,
        limit_ms: u64::try_from(args.limit.as_millis()).unwrap_or(u64::MAX),
    };
    let drained = client::drain(&args.socket, &ask, args.limit)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &drained)?;
        writeln!(out)?;
        return Ok(());
    }
    if drained.is_empty() {
        writeln!(out, "nothing is served here")?;
    }
    for home in &drained {
        let (name, to) = (&home.home, &home.to);
        let (machines, flows, failed) = (home.machines, home.flows, home.failed);
        if args.dry_run {
            writeln!(
                out,
                "home {name}: {machines} machines, {flows} connections would go to {to}"
            )?;
        } else if !home.changed {
            writeln!(out, "home {name}: it is at {to} already")?;
        } else {
            writeln!(
                out,
                "home {name}: {machines} machines, {flows} connections went to {to} in {:.2} s; \
                 {failed} could not be handed over",
                home.seconds
            )?;
        }
    }
    Ok(())
}

pub(super) fn show_status(args: &LookArgs) -> Result<()> {
    let status = look::find_status(args.socket.as_ref())?;
    let mut out = std::io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &status)?;
        writeln!(out)?;
        return Ok(());
    }
    print_status(&status, &mut out)?;
    Ok(())
}

pub(super) fn try_kernel(args: &CheckArgs) -> Result<()> {
    let found = check::check(&args.pins)?;
    let peers: Vec<IpAddr> = match look::find_status(args.socket.as_ref()) {
        _ if args.no_paths => Vec::new(),
        _ if !args.peer.is_empty() => args.peer.clone(),
        Ok(status) => status.peers.iter().map(|p| p.underlay.into()).collect(),
        // A socket that was asked for by name must answer; without one this is about the kernel.
        Err(error) if args.socket.is_some() => return Err(error.into()),
        Err(_) => Vec::new(),
    };
    let homes = match look::find_status(args.socket.as_ref()) {
        Ok(status) if !args.no_paths => status.homes,
        _ => Vec::new(),
    };
    let paths: Vec<_> = peers.into_iter().map(probe::path).collect();
    let mut out = std::io::stdout().lock();
    if args.json {
        let bpf = check::can_bpf(&found);
        let all =
            serde_json::json!({ "bpf": bpf, "kernel": found, "paths": paths, "edges": homes });
        serde_json::to_writer_pretty(&mut out, &all)?;
        writeln!(out)?;
        return Ok(());
    }
    for finding in &found {
        writeln!(out, "{:<7} {}", if finding.works { "yes" } else { "no" }, finding.what)?;
        if !finding.detail.is_empty() {
            writeln!(out, "        {}", finding.detail)?;
        }
        if !finding.instead.is_empty() {
            writeln!(out, "        instead: {}", finding.instead)?;
        }
    }
    for path in &paths {
        let size = |size: Option<u32>| size.map_or("-".to_owned(), |size| size.to_string());
        let (carries, inside) = (size(path.carries), size(path.inside));
        let time = path.round_trip_us.map_or("-".to_owned(), |us| format!("{us} us"));
        let works = if path.detail.is_empty() { "yes" } else { "no" };
        let peer = path.peer;
        writeln!(
            out,
            "{works:<7} path to {peer}: carries {carries} bytes (believed {}), machines' packets of \
             {inside}; round trip {time}",
            path.believed
        )?;
        if !path.detail.is_empty() {
            writeln!(out, "        {}", path.detail)?;
        }
    }
    for HomeStatus { word, health, .. } in &homes {
        let well = ["here", "alive", "connected"].iter().any(|w| health.starts_with(w));
        let (works, name, by) = (if well { "yes" } else { "no" }, &word.name, word.by.overlay);
        writeln!(out, "{works:<7} edge {name}: {health}; its home is served by {by}")?;
    }
    let way = if check::can_bpf(&found) { "BPF" } else { "routes (--path routes)" };
    writeln!(out, "frames can be led by {way}")?;
    Ok(())
}

fn print_status(status: &Status, out: &mut dyn Write) -> std::io::Result<()> {
    let Peer { overlay, underlay } = status.peer;
    writeln!(out, "{} {} at {overlay} (underlay {underlay})", status.role, status.host)?;
    writeln!(out, "  {}", status.link)?;
    let protection =
        if status.protection.is_empty() { "not encrypted" } else { &status.protection };
    writeln!(out, "  frames find their way by {}, {protection}", status.path)?;
    writeln!(out, "  {} machines, {} peers", status.machine_count, status.peers.len())?;
    for peer in &status.peers {
        let silent = if status.silent.contains(&peer.overlay) { ", silent" } else { "" };
        writeln!(out, "  peer {} at {}{silent}", peer.overlay, peer.underlay)?;
    }
    keys::print(&status.pairs, out)?;
    for home in &status.homes {
        let HomeStatus { word, health, machines } = home;
        let (name, public, by) = (&word.name, word.public, word.by.overlay);
        let by = if by == word.home { String::new() } else { format!(", served by {by}") };
        writeln!(out, "  home {name} ({public}): {machines} machines, {health}{by}")?;
    }
    for (name, count) in status.counts.iter().filter(|(_, n)| **n > 0) {
        writeln!(out, "  {count:>12} {name}")?;
    }
    Ok(())
}
