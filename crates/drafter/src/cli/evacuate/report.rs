//! What is told: the plan beforehand, and what became of each machine.

use super::{deeds::Asleep, destinations::Destination};
use crate::cli::output::bytes;
use evacuation::{Load, Plan, Way};
use serde::Serialize;
use std::collections::BTreeMap;

/// What is planned for a machine.
#[derive(Debug, Serialize)]
pub(super) struct Planned {
    machine: String,
    /// None: no way is open to it.
    way: Option<Way>,
    /// The host that is asked first, of one that moves.
    to: Option<String>,
    /// It is expected to leave in time; else it is tried last.
    expected: bool,
    /// What it has to send at first, bytes.
    send_bytes: u64,
    /// From the plan until nothing of it is needed here, seconds.
    safe_s: Option<f64>,
}

impl Planned {
    /// All machines of a plan, in the order in which they begin.
    pub(super) fn of(plan: &Plan, loads: &[Load], to: &BTreeMap<String, Destination>) -> Vec<Self> {
        let steps = plan.steps.iter().map(|step| (step.machine, Some(step.way), Some(step.times)));
        let left = plan.left.iter().map(|left| (left.machine, left.way, None));
        let planned = |(machine, way, times): (usize, Option<Way>, Option<evacuation::Times>)| {
            let load: &Load = &loads[machine];
            let moves = way.is_some_and(|way| way != Way::Suspend);
            let host = to.get(&load.name).filter(|_| moves).and_then(|to| to.place.first());
            Self {
                machine: load.name.clone(),
                way,
                to: host.map(str::to_owned),
                expected: times.is_some(),
                send_bytes: way.map_or(0, |way| way.first_copy(load).0),
                safe_s: times.map(|times| times.safe.as_secs_f64()),
            }
        };
        steps.chain(left).map(planned).collect()
    }
}

/// Those who leave, a line each. (The verdict names the others.)
pub(super) fn planned_lines(planned: &[Planned]) -> String {
    let line = |one: &Planned| {
        let (way, safe) = (one.way?, one.safe_s?);
        let to = one.to.as_ref().map_or(String::new(), |to| format!(" to {to}"));
        let send = bytes(one.send_bytes);
        Some(format!("\n  \"{}\": {way}{to}, {send} to send, safe after {safe:.1} s", one.machine))
    };
    planned.iter().filter_map(line).collect()
}

/// What became of a machine.
#[derive(Debug, Default, Serialize)]
pub(super) struct Outcome {
    pub(super) machine: String,
    /// The host that has it now, if one has.
    pub(super) host: Option<String>,
    pub(super) way: Option<Way>,
    /// Whether the plan expected it to leave in time.
    pub(super) expected: bool,
    /// From the beginning of the evacuation until nothing of it was needed here, seconds.
    pub(super) safe_s: Option<f64>,
    /// Whether that was before the deadline.
    pub(super) in_time: bool,
    pub(super) blackout_ms: Option<f64>,
    /// Bytes that a move sent, and bytes of blocks that the other host had already.
    pub(super) sent_bytes: Option<u64>,
    /// See there.
    pub(super) known_bytes: u64,
    /// What it was put to sleep as.
    pub(super) asleep: Option<Asleep>,
    /// Why it did not move, of one that was put to sleep instead.
    pub(super) not_moved: Option<String>,
    /// From the beginning until it ran again, seconds, if another host has woken it.
    pub(super) woken_s: Option<f64>,
    /// Why no host has woken it, if one was to.
    pub(super) not_woken: Option<String>,
    /// Why it is still here.
    pub(super) error: Option<String>,
}

impl Outcome {
    fn line(&self) -> String {
        let machine = &self.machine;
        let (None, Some(safe)) = (&self.error, self.safe_s) else {
            return format!("  {machine}: still here: {}", self.error.as_deref().unwrap_or("-"));
        };
        let late = if self.in_time { "" } else { ", after the deadline" };
        let Some(asleep) = &self.asleep else {
            let known = match self.known_bytes {
                0 => String::new(),
                known => format!(", {} were there already", bytes(known)),
            };
            return format!(
                "  {machine}: safe at {} after {safe:.1} s ({}, {} sent{known}, blackout {:.1} ms){late}",
                self.host.as_deref().unwrap_or("-"),
                self.way.map_or("", Way::name),
                bytes(self.sent_bytes.unwrap_or_default()),
                self.blackout_ms.unwrap_or_default(),
            );
        };
        let mut line = format!(
            "  {machine}: safe in the store after {safe:.1} s (generation {} of {}, {} stored){late}",
            asleep.generation,
            asleep.line,
            bytes(asleep.stored_bytes),
        );
        if let Some(why) = &self.not_moved {
            line += &format!("\n    it did not move: {why}");
        }
        if let (Some(host), Some(woken)) = (&self.host, self.woken_s) {
            return line + &format!("\n    it runs at {host} since {woken:.1} s");
        }
        if let Some(why) = &self.not_woken {
            line += &format!("\n    it was not woken: {why}");
        }
        line + &format!("\n    it sleeps until somebody wakes it: {}", asleep.resume)
    }
}

/// All outcomes, for people.
pub(super) fn lines(outcomes: &[Outcome]) -> String {
    outcomes.iter().map(Outcome::line).collect::<Vec<_>>().join("\n")
}
