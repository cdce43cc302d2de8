//! Readers of generations that are pruned and collected meanwhile.

use crate::support::*;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory};
use silo_block::io::BlockDevice;
use silo_store::{
    Generation, GenerationDevice, Retention, Store, StoreError, Which, capture::Want,
};
use silo_testing::{Fault, Rule};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

const LEASE: Duration = Duration::from_secs(600);
const SIZE: usize = 300_000;

/// A line whose second generation shares nothing with the first; the first's number and content.
fn two(store: &Arc<Store>) -> (u64, Vec<u8>) {
    let first = noise(1, SIZE);
    let disk = Disk::new(first.clone());
    let group = group(&[("disk", 4096, &disk)]);
    let mut writer = writer(store, "vm");
    round(&mut writer, &group, Want::Changed).unwrap();
    let number = generation(store, "vm", Which::Newest).unwrap().number();
    group.device(0).write_at(0, &noise(2, SIZE)).unwrap();
    round(&mut writer, &group, Want::Changed).unwrap();
    (number, first)
}

/// By somebody whose clock is far ahead: no pin counts for that one.
fn prune(store: &Store) {
    let later = SystemTime::now() + Duration::from_secs(30 * 24 * 3600);
    let pruned = store.prune(&line("vm"), &Retention::default(), later, false).unwrap();
    assert_eq!((pruned.deleted.len(), pruned.in_use), (1, 0));
}

fn collect(store: &Store) {
    store.mark(Duration::ZERO, false).unwrap();
    store.sweep(Duration::ZERO).unwrap();
}

fn content(generation: &Arc<Generation>) -> Result<Vec<u8>, StoreError> {
    let mut all = vec![0; SIZE];
    let device = GenerationDevice::new(generation, "disk", 0).unwrap();
    device
        .read_at(0, &mut all)
        .map_err(|error| *error.into_inner().unwrap().downcast::<StoreError>().unwrap())?;
    Ok(all)
}

fn pins(backend: &InMemory) -> Vec<object_store::path::Path> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let listed = backend.list(Some(&"folder/pins".into()));
    let found = runtime.block_on(listed.try_collect::<Vec<_>>()).unwrap();
    found.into_iter().map(|meta| meta.location).collect()
}

#[test]
fn what_a_pinned_generation_refers_to_stays_though_it_is_pruned_and_collected() {
    let (backend, store) = in_memory();
    let (number, first) = two(&store);
    let reader = generation(&store, "vm", Which::Number(number)).unwrap();
    reader.pin(LEASE).unwrap();
    reader.pin(LEASE).unwrap();
    assert_eq!(pins(&backend).len(), 1);
    // Who knows of the pin leaves the generation where it is.
    let pruned = store.prune(&line("vm"), &Retention::default(), SystemTime::now(), false).unwrap();
    assert_eq!((pruned.deleted.len(), pruned.kept, pruned.in_use), (0, 2, 1));
    prune(&store);
    collect(&store);
    assert_eq!(content(&reader).unwrap(), first);
    assert_eq!(restored(&reader, "disk").unwrap(), first);
    // Condemned while nobody read it, and read again before it was due.
    drop(reader);
    assert!(pins(&backend).is_empty());
    assert_eq!(store.mark(Duration::ZERO, false).unwrap().unwrap().objects.len(), 1);
    store.sweep(Duration::ZERO).unwrap();
    let gone = generation(&store, "vm", Which::Number(number)).err().unwrap();
    assert!(matches!(gone, StoreError::NoGeneration { .. }), "{gone}");
}

#[test]
fn a_pin_that_comes_between_both_steps_of_a_collection_spares_what_was_condemned() {
    let (_, store) = in_memory();
    let (number, first) = two(&store);
    let reader = generation(&store, "vm", Which::Number(number)).unwrap();
    let other = generation(&store, "vm", Which::Number(number)).unwrap();
    other.pin(LEASE).unwrap();
    prune(&store);
    // The entry is gone, so a new pin would come too late; the one that is there counts.
    assert!(matches!(reader.pin(LEASE), Err(StoreError::Pruned { .. })));
    assert_eq!(store.mark(Duration::ZERO, false).unwrap(), None);
    assert_eq!(content(&other).unwrap(), first);
}

#[test]
fn without_a_pin_what_was_pruned_while_it_was_read_is_an_error_that_says_so() {
    let (backend, store) = in_memory();
    let (number, _) = two(&store);
    let reader = generation(&store, "vm", Which::Number(number)).unwrap();
    prune(&store);
    collect(&store);
    for error in [content(&reader).unwrap_err(), restored(&reader, "disk").unwrap_err()] {
        assert!(matches!(error, StoreError::Pruned { number: n, .. } if n == number), "{error}");
        assert!(error.to_string().contains("acme/vm"), "{error}");
    }
    let late = reader.pin(LEASE).unwrap_err();
    assert!(matches!(late, StoreError::Pruned { .. }), "{late}");
    assert!(pins(&backend).is_empty(), "and no pin stays behind");
}

#[test]
fn a_pin_whose_lease_is_over_keeps_nothing_and_a_damaged_one_stops_the_collection() {
    let (backend, store) = in_memory();
    let (number, _) = two(&store);
    let reader = generation(&store, "vm", Which::Number(number)).unwrap();
    reader.pin(LEASE).unwrap();
    let pin = pins(&backend).remove(0);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let put = |name: &str, bytes: bytes::Bytes| {
        runtime.block_on(backend.put(&name.into(), bytes.into())).unwrap();
    };
    let read = runtime.block_on(backend.get(&pin));
    let bytes = runtime.block_on(read.unwrap().bytes()).unwrap();
    let lease = format!("{:016x}", LEASE.as_secs());
    let over = pin.as_ref().replace(&lease, "0000000000000000");
    put(&over, bytes.clone());
    drop(reader);
    prune(&store);
    let damaged = pin.as_ref().to_owned();
    put(&damaged, bytes.slice(1..));
    let error = store.mark(Duration::ZERO, false).unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    runtime.block_on(backend.delete(&damaged.as_str().into())).unwrap();
    let marked = store.mark(Duration::ZERO, false).unwrap().unwrap();
    assert_eq!(marked.objects.len(), 1, "the killed reader's pin has run out");
}

#[test]
fn a_store_that_takes_no_pin_is_an_error_and_the_generation_is_read_all_the_same() {
    let server = server();
    let store = s3(&server, limits());
    let (number, first) = two(&store);
    let reader = generation(&store, "vm", Which::Number(number)).unwrap();
    server.faults().add(Rule::all("PUT", "pins/", Fault::Status(403)));
    let error = reader.pin(LEASE).unwrap_err();
    assert!(!matches!(error, StoreError::Pruned { .. }), "{error}");
    assert_eq!(content(&reader).unwrap(), first);
    server.faults().clear();
    reader.pin(LEASE).unwrap();
}
