//! What is wrong with a host's files is found at load, and the message names the file.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use identity::{Authority, Error, HostName, Identity};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

const HOUR: Duration = Duration::from_secs(3600);

fn name(text: &str) -> HostName {
    HostName::new(text).unwrap()
}

fn authority(dir: &Path) -> Authority {
    let authority = Authority::create(dir).unwrap();
    authority.issue(&name("a"), HOUR).unwrap();
    authority.issue(&name("b"), HOUR).unwrap();
    authority
}

#[test]
fn private_keys_are_readable_by_their_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path());
    for file in ["ca.key", "a.key"] {
        let mode = fs::metadata(dir.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    fs::set_permissions(dir.path().join("a.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let e = Identity::load(dir.path(), &name("a")).unwrap_err();
    assert!(matches!(e, Error::ExposedKey { mode: 0o644, .. }), "{e}");
}

#[test]
fn an_authority_is_never_replaced_by_accident() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path());
    assert!(matches!(Authority::create(dir.path()), Err(Error::Exists { .. })));
}

#[test]
fn a_reopened_authority_issues_certificates_that_the_first_ones_trust() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path());
    Authority::open(dir.path()).unwrap().issue(&name("c"), HOUR).unwrap();
    assert_eq!(Identity::load(dir.path(), &name("c")).unwrap().name().as_str(), "c");
}

#[test]
fn every_missing_or_damaged_file_is_named() {
    for file in ["ca.crt", "a.crt", "a.key"] {
        let dir = tempfile::tempdir().unwrap();
        authority(dir.path());
        let path = dir.path().join(file);
        fs::write(&path, "-----BEGIN NOTHING-----\n").unwrap();
        let e = Identity::load(dir.path(), &name("a")).unwrap_err();
        assert!(matches!(e, Error::BadFile { .. }), "{e}");
        assert!(e.to_string().contains(file), "{e}");
        fs::remove_file(&path).unwrap();
        let e = Identity::load(dir.path(), &name("a")).unwrap_err();
        assert!(matches!(e, Error::MissingFile { .. }), "{e}");
        assert!(e.to_string().contains(file), "{e}");
    }
}

#[test]
fn a_key_of_another_issue_is_a_mismatch() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path());
    fs::copy(dir.path().join("b.key"), dir.path().join("a.key")).unwrap();
    let e = Identity::load(dir.path(), &name("a")).unwrap_err();
    assert!(matches!(e, Error::KeyMismatch { .. }), "{e}");
}

#[test]
fn a_certificate_under_another_files_name_is_for_the_wrong_name() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path());
    for kind in ["crt", "key"] {
        let (from, to) = (format!("b.{kind}"), format!("a.{kind}"));
        fs::copy(dir.path().join(from), dir.path().join(to)).unwrap();
    }
    let e = Identity::load(dir.path(), &name("a")).unwrap_err();
    assert!(matches!(e, Error::WrongName { .. }), "{e}");
}

#[test]
fn a_certificate_of_another_authority_is_found_at_load() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    authority(dir.path());
    authority(other.path());
    fs::copy(other.path().join("ca.crt"), dir.path().join("ca.crt")).unwrap();
    let e = Identity::load(dir.path(), &name("a")).unwrap_err();
    assert!(matches!(e, Error::UnknownAuthority { .. }), "{e}");
}
