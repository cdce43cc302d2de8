//! Machines whose leases are kept by a server, by the address that a person gives.
#![allow(clippy::unwrap_used, reason = "a test ends by panicking")]

use drafter::{
    lease::{self, MachineName},
    migrate::messages::Mode,
};
use e2e::{
    Stage,
    busy::sh,
    command::say,
    moves::{budgets, go, there_and_back},
    program,
};
use std::time::Duration;

/// More than a server needs to be there again.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_machine_whose_lease_is_in_postgresql_moves_and_outlives_a_crash_of_the_server() {
    let Some(mut stage) = Stage::open() else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some(mut server) = lease_testing::Postgres::start(folder.path(), false) else { return };
    let store = lease::open(&server.address, LONG).unwrap();
    let machine = MachineName::new("redis").unwrap();
    assert_eq!(store.read(&machine).unwrap(), None);

    let mut spec = stage.plain_spec("redis");
    spec.lease = Some(server.address.clone());
    let (a, b) = stage.pair(&spec);
    let epoch = || store.read(&machine).unwrap().unwrap().epoch.0;
    assert_eq!(epoch(), 1);
    sh(stage.fleet.runner(a), "echo here > /tmp/note");
    let (end, _) = there_and_back(&stage.fleet, (a, b), 2, Mode::Hybrid, budgets());
    assert_eq!(epoch(), 3);

    // A machine that is not protected does not need the store while it stays.
    server.server.kill();
    assert_eq!(sh(stage.fleet.runner(end), "cat /tmp/note").trim(), "here");
    server.server.start_again();
    let other = if end == a { b } else { a };
    go(&stage.fleet, end, other, Mode::Hybrid, budgets());
    assert_eq!(epoch(), 4);
    assert_eq!(sh(stage.fleet.runner(other), "cat /tmp/note").trim(), "here");

    // A second machine of that name, on a host that knows nothing of the first: refused by the lease
    // alone.
    let hosts = stage.fleet.rig().hosts();
    let mut again = hosts[0].namespace.command(program("drafter"));
    again.arg("--state").arg(folder.path().join("state"));
    again
        .args(["run", "redis", "--plaintext", "--host", "another", "--package"])
        .arg(stage.package());
    let said = say(again.arg("--lease").arg(&server.address), LONG);
    said.fails_with(&["redis", hosts[1].name.as_str()]);
    assert_eq!(epoch(), 4);
}
