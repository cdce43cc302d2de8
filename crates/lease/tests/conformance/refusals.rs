//! Stores that refuse: what people are told, and that no password is in it.

use crate::{api_server::ApiServer, rig::Rig};
use lease::{LeaseStore as _, MachineName, StoreError};
use lease_testing::{Etcd, Postgres, Security, secret_file};
use silo_testing::S3Server;
use std::time::{Duration, Instant};

/// A refusal must not wait for it.
const LIMIT: Duration = Duration::from_secs(300);

/// What is said of a refusal, which comes at once.
fn refused(address: &str, says: &str) {
    let store = lease::open(address, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    let begun = Instant::now();
    let e = store.read(&MachineName::new("redis-1").unwrap()).unwrap_err();
    assert!(matches!(e, StoreError::Refused { .. }), "{address}: {e:?}");
    assert!(begun.elapsed() < LIMIT / 2, "it was tried again and again: {e}");
    let text = e.to_string();
    assert!(text.contains(says), "{address}: {text}");
    assert!(text.starts_with("lease of machine \"redis-1\": cannot read "), "{text}");
    assert!(!text.contains("hush"), "{text}");
}

#[test]
fn postgres_refuses_wrong_passwords_names_certificates_and_rights_by_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = Postgres::start(folder.path(), true) else { return };
    let (port, authority) = server.tls.clone().unwrap();
    let (good, query) = server.address.split_once('?').unwrap();
    let wrong = secret_file(folder.path(), "wrong", "hush");
    refused(&format!("{good}?password_file={wrong}"), "password authentication failed");
    refused(&format!("{good}?password_file=/nowhere"), "/nowhere");
    refused(good, "password missing");
    refused(&format!("{good}s?{query}"), "does not exist (3D000)");
    // Over TLS: the right name, a wrong one, an authority that we do not know.
    let over = |host: &str| format!("postgres://owner@{host}:{port}/postgres?{query}");
    let ca = format!("&sslrootcert={}", authority.display());
    let store = lease::open(&format!("{}{ca}", over("localhost")), LIMIT).unwrap();
    assert_eq!(store.read(&MachineName::new("redis-1").unwrap()).unwrap(), None);
    refused(&format!("{}{ca}", over("127.0.0.1")), "certificate");
    refused(&over("localhost"), "certificate");
    // Somebody without rights, before there is a table and after.
    server.sql("DROP TABLE architect_leases");
    server.sql("CREATE ROLE guest LOGIN PASSWORD 'guest'");
    let guest = secret_file(folder.path(), "guest", "guest");
    let place = good.replace("owner@", "guest@");
    let place = format!("{place}?password_file={guest}");
    refused(&place, "CREATE TABLE IF NOT EXISTS architect_leases");
    assert!(store.read(&MachineName::new("redis-1").unwrap()).unwrap().is_none());
    refused(&place, "permission denied");
    server.sql("GRANT SELECT, INSERT, UPDATE ON architect_leases TO guest");
    let store = lease::open(&place, LIMIT).unwrap();
    assert_eq!(store.read(&MachineName::new("redis-1").unwrap()).unwrap(), None);
    // A server that does not keep what it says it has.
    server.sql("ALTER SYSTEM SET fsync = off");
    server.sql("SELECT pg_reload_conf()");
    let until = Instant::now() + LIMIT;
    loop {
        // The server reads its settings a moment later.
        let store = lease::open(&place, LIMIT).unwrap();
        match store.read(&MachineName::new("redis-1").unwrap()) {
            Ok(_) => assert!(Instant::now() < until, "fsync = off is taken"),
            Err(e) => {
                assert!(e.to_string().contains("fsync = off"), "{e}");
                break;
            }
        }
    }
}

#[test]
fn etcd_refuses_wrong_passwords_and_certificates_by_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = Etcd::start(folder.path(), Security::Password) else { return };
    server.switch_passwords_on();
    let wrong = secret_file(folder.path(), "wrong", "hush");
    let right = secret_file(folder.path(), "right", "right");
    let host = &server.host;
    refused(&format!("etcd://root@{host}/leases?password_file={wrong}"), "authentication failed");
    refused(&format!("etcd://{host}/leases"), "user name is empty");
    let store = format!("etcd://root@{host}/leases?password_file={right}");
    let store = lease::open(&store, LIMIT).unwrap();
    assert_eq!(store.read(&MachineName::new("redis-1").unwrap()).unwrap(), None);

    let folder = tempfile::tempdir().unwrap();
    let Some(server) = Etcd::start(folder.path(), Security::Encrypted) else { return };
    let ca = server.authority.clone().unwrap();
    let wrong = server.host.replace("localhost", "127.0.0.1");
    refused(&format!("etcd://{wrong}/leases?ca={}", ca.display()), "certificate");
    refused(&format!("etcd://{}/leases?tls=yes", server.host), "certificate");
}

#[test]
fn an_api_server_refuses_wrong_tokens_names_and_certificates_by_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let server = ApiServer::start(folder.path());
    let wrong = secret_file(folder.path(), "wrong", "hush");
    let (port, ca) = (server.port, server.authority.display());
    let at = |namespace: &str, host: &str, token: &str, ca: &str| {
        format!("kubernetes://{namespace}?server=https://{host}:{port}&token_file={token}{ca}")
    };
    let right = folder.path().join("token").display().to_string();
    let ca = format!("&ca={ca}");
    refused(&at("machines", "localhost", &wrong, &ca), "401");
    refused(&at("machines", "localhost", "/nowhere", &ca), "/nowhere");
    refused(&at("others", "localhost", &right, &ca), "forbidden");
    refused(&at("machines", "127.0.0.1", &right, &ca), "certificate");
    refused(&at("machines", "localhost", &right, ""), "certificate");
}

#[test]
fn s3_refuses_wrong_credentials_and_buckets_by_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path()).unwrap();
    let machine = MachineName::new("redis-1").unwrap();
    let open = |url: &str, secret: &str| {
        let access = server.credentials()[0].1;
        let pairs = [("AWS_ACCESS_KEY_ID", access), ("AWS_SECRET_ACCESS_KEY", secret)];
        let environment = bucket::Environment::given(pairs);
        lease::open_bucket(&url.parse().unwrap(), &environment, LIMIT).unwrap()
    };
    let right = server.credentials()[1].1;
    let url = server.url("leases");
    for (url, secret, says) in [
        (url.clone(), "hush", "SignatureDoesNotMatch"),
        (url.replace("//bucket/", "//nobucket/"), right, "NoSuchBucket"),
    ] {
        let e = open(&url, secret).read(&machine).unwrap_err();
        assert!(matches!(e, StoreError::Refused { .. }), "{e:?}");
        assert!(e.to_string().contains(says) && !e.to_string().contains("hush"), "{e}");
    }
    assert_eq!(open(&url, right).read(&machine).unwrap(), None);
}

#[test]
fn a_renewal_is_one_request_where_requests_are_billed() {
    let rig = Rig::start("s3").unwrap();
    let store = rig.open(LIMIT);
    let name = lease::BeatName::of_host(lease::HostName::new("a").unwrap());
    let term = Duration::from_secs(3);
    let mut beat = lease::Beat::begun(name.clone(), None, term, lease::Nonce(0));
    assert_eq!(store.compare_and_set_beat(&name, None, &beat).unwrap(), lease::Outcome::Won);
    rig.s3().faults().take_seen();
    for nonce in 1..=10 {
        let next = beat.renewed(term, lease::Nonce(nonce));
        let outcome = store.compare_and_set_beat(&name, Some(&beat), &next).unwrap();
        assert_eq!(outcome, lease::Outcome::Won);
        beat = next;
    }
    let seen = rig.s3().faults().take_seen();
    assert_eq!(seen.len(), 10, "{seen:?}");
}
