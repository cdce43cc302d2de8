//! A store that is slow, gone, lies or is stale, from the first moment on, in the middle, or once
//! the destination runs: the move goes well all the same.

use crate::{
    common::{MIB, rig::*, until},
    site::{Kind, Move, Plan, Site},
};
use silo_testing::{Fault, Rule};
use std::time::Duration;

/// What goes wrong.
#[derive(Clone, Debug)]
enum Trouble {
    /// With each answer.
    Answers(Fault),
    /// Nobody is there.
    Gone,
}

/// From when on.
#[derive(Clone, Copy, Debug)]
enum From {
    Start,
    Middle,
    Token,
}

fn begin(site: &Site, trouble: &Trouble) {
    let server = site.server.as_ref().unwrap();
    match trouble {
        Trouble::Answers(fault) => server.faults().add(Rule::all("GET", "packs", fault.clone())),
        Trouble::Gone => server.go_away(),
    }
}

fn end(site: &Site, trouble: &Trouble) {
    let server = site.server.as_ref().unwrap();
    match trouble {
        Trouble::Answers(_) => server.faults().clear(),
        Trouble::Gone => server.come_back().unwrap(),
    }
}

/// A pack of other content, as an object that is served in place of the right one.
fn other_pack(site: &Site) -> String {
    let packs = site.server.as_ref().unwrap().file("folder/packs");
    let all = walkable(&packs);
    let first = all.first().unwrap().strip_prefix(packs.parent().unwrap()).unwrap();
    format!("folder/{}", first.display())
}

fn walkable(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walkable(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

fn try_with(trouble: &Trouble, from: From, lasts: bool) {
    let site = Site::new(Kind::S3, 3 * MIB, 7);
    let what = format!("{trouble:?} from {from:?} on, lasting: {lasts}");
    if matches!(from, From::Start) {
        begin(&site, trouble);
    }
    let switch = matches!(from, From::Token);
    let plan = Plan { rate: 3_000_000, switch, patience: 30_000, ..Plan::default() };
    let Move { outbound, receiver, there, .. } = site.start(plan);
    let session = receiver.session(1);
    match from {
        From::Start => {}
        From::Middle => {
            until("something of the store", || {
                session.counters().from_store > 0 || session.is_over()
            });
            begin(&site, trouble);
        }
        From::Token => {
            receiver.host.wait_for(|seen| matches!(seen, Seen::Run(..)));
            begin(&site, trouble);
        }
    }
    if !lasts {
        until("a while", || session.progress().remaining < 2 * MIB || session.is_over());
        end(&site, trouble);
    }
    outbound.wait().unwrap_or_else(|error| panic!("{what}: {error}"));
    let arrived = session.wait().unwrap_or_else(|error| panic!("{what}: {error}"));
    same(&*site.device, &*there);
    same(&*site.device, &*site.target);
    let counters = arrived.counters;
    assert!(counters.from_store + counters.from_peer >= 3 * MIB / 4096, "{what}: {counters:?}");
}

fn all_moments(trouble: &Trouble) {
    for from in [From::Start, From::Middle, From::Token] {
        for lasts in [true, false] {
            try_with(trouble, from, lasts);
        }
    }
}

#[test]
fn check_15_a_store_that_is_gone_at_any_moment_costs_no_block() {
    all_moments(&Trouble::Gone);
}

#[test]
fn check_15_a_store_that_is_slow_or_never_answers_costs_no_block() {
    all_moments(&Trouble::Answers(Fault::Slow(Duration::from_millis(250))));
    all_moments(&Trouble::Answers(Fault::Hangs));
}

#[test]
fn check_15_a_store_that_fails_or_has_lost_objects_costs_no_block() {
    all_moments(&Trouble::Answers(Fault::Status(500)));
    all_moments(&Trouble::Answers(Fault::Status(404)));
    all_moments(&Trouble::Answers(Fault::Truncated));
}

#[test]
fn check_15_a_store_that_lies_or_is_stale_costs_no_block() {
    all_moments(&Trouble::Answers(Fault::WrongBytes));
    let site = Site::new(Kind::S3, 3 * MIB, 7);
    // The same seed makes another pack each time: keys are drawn. One of another store is as wrong.
    let stale = other_pack(&site);
    all_moments(&Trouble::Answers(Fault::Stale(stale)));
}
