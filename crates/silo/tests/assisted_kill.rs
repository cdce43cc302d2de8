//! The kill matrix with a store beside the move, on real processes: what the source, the destination,
//! the line and the store do when one of them is lost at every message boundary. The source may go
//! on the strength of the store, so a destination that is killed then has nobody else.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "../../silo-move/tests/common/mod.rs"]
mod common;
#[path = "assisted/site.rs"]
#[allow(dead_code, reason = "a part of it is used here")]
mod site;

use common::{
    file::FileDevice,
    killing::{Extras, SIZE, Scene, Victim, child as play, matrix},
};
use silo::{
    assist::{InStore, StorePlace},
    moving::codec::Naming,
};
use silo_testing::S3Server;
use site::Shelf;
use std::{env, path::Path, sync::Arc};

const URL: &str = "SILO_ASSIST_URL";

/// Not a test: what the parents start.
#[test]
fn child() {
    play(&Extras {
        bandwidth: Some(500_000),
        source: |options| {
            let shelf = Shelf::at(&env::var(URL).unwrap());
            options.stored = Some(Arc::new(InStore::new(Box::new(move || shelf.newest()))));
        },
        destination: |options| {
            let shelf = Shelf::at(&env::var(URL).unwrap());
            let open = Box::new(move || shelf.newest());
            options.places = vec![Arc::new(StorePlace::new("store", Naming::Plain, open))];
            options.session.early_release = true;
        },
    });
}

/// A store on a port of its own, new for each move.
struct Beside {
    folder: tempfile::TempDir,
    server: Option<S3Server>,
}

impl Beside {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), server: None }
    }

    fn server(&self) -> &S3Server {
        self.server.as_ref().unwrap()
    }
}

impl Scene for Beside {
    fn prepare(&mut self, device: &Path) {
        let server = S3Server::start(self.folder.path()).unwrap();
        let shelf = Shelf::of_server(&server);
        shelf.keep(Arc::new(FileDevice::open(device, SIZE).unwrap()));
        self.server = Some(server);
    }

    fn environment(&self) -> Vec<(String, String)> {
        let pair = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let mut all: Vec<_> = self.server().credentials().into_iter().map(pair).collect();
        all.push((URL.to_owned(), self.server().url("folder")));
        all
    }

    fn store(&self, there: bool) {
        if there {
            self.server().come_back().unwrap();
        } else {
            self.server().go_away();
        }
    }
}

#[test]
fn check_15_a_store_lost_and_returned_at_every_boundary() {
    assert!(matrix(&mut Beside::new(), Victim::Store) > 20);
}

#[test]
fn check_16_21_a_source_killed_at_every_boundary_beside_a_store() {
    assert!(matrix(&mut Beside::new(), Victim::Source) > 20);
}

#[test]
fn check_18_21_a_destination_killed_at_every_boundary_beside_a_store() {
    assert!(matrix(&mut Beside::new(), Victim::Destination) > 20);
}

#[test]
fn check_19_a_line_cut_at_every_boundary_beside_a_store() {
    assert!(matrix(&mut Beside::new(), Victim::Line) > 20);
}
