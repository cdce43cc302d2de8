//! Leases as Lease objects of a Kubernetes cluster (`coordination.k8s.io/v1`).
//!
//! The record is an annotation; what `kubectl get leases` shows (holder, renewal, duration) is filled in
//! for people and read by nobody here. A swap reads the object and puts it back with the
//! `resourceVersion` that it had: the API server refuses with 409 if it has changed. A read names no
//! version, so it is answered by a quorum.
//!
//! In a pod everything is found by itself: `kubernetes://NAMESPACE`. Rights: get, create and update of
//! `leases` in that namespace.

use super::{
    Beat, Key, Record, Swap,
    address::{Address, secret},
    http::{self, Answered, excerpt},
    remote::{Backend, Failure},
    tls,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{Client, Method, StatusCode, header::CONTENT_TYPE};
use serde_json::{Map, Value, json};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Where a pod finds who it is.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The record.
const CONTENT: &str = "architect/record";

/// Which one, whole: the object's name has only a part of it.
const WHOSE: &str = "architect/key";

/// In front of content that is no text.
const ENCODED: &str = "base64:";

/// A namespace.
pub(crate) struct Kubernetes {
    client: Client,
    /// `https://host:port`.
    server: String,
    namespace: String,
    /// Read for every request: tokens of pods last an hour.
    token: Option<PathBuf>,
}

/// The API server's address, as a pod's environment has it.
fn server_of_pod(host: Option<&str>, port: Option<&str>) -> Result<String, String> {
    let (Some(host), Some(port)) = (host, port) else {
        return Err("this is no pod (KUBERNETES_SERVICE_HOST is not set): name the API server by \
                    server=https://…, with token_file= and ca="
            .to_owned());
    };
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    Ok(format!("https://{host}:{port}"))
}

impl Kubernetes {
    /// Makes no request yet. `rest` follows the scheme: `//NAMESPACE`, with `server=URL`,
    /// `token_file=FILE`, `ca=FILE`, `cert=FILE` and `key=FILE`; what is not named is the pod's.
    /// `variable` reads the environment.
    pub(crate) fn new(
        rest: &str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let Address { user, hosts, path, mut options } = Address::parse(rest)?;
        let [namespace] = hosts[..] else { return Err("it names several namespaces".to_owned()) };
        if user.is_some() || !path.is_empty() {
            return Err("it is kubernetes://NAMESPACE".to_owned());
        }
        let clean = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if namespace.len() > 63 || !namespace.bytes().all(clean) {
            return Err(format!("\"{namespace}\" is no namespace"));
        }
        let given = options.take("server").map(|url| url.trim_end_matches('/').to_owned());
        let in_pod = given.is_none();
        let server = match given {
            Some(url) if url.starts_with("https://") || url.starts_with("http://") => url,
            Some(_) => return Err("server= takes https:// (or http://)".to_owned()),
            None => server_of_pod(
                variable("KUBERNETES_SERVICE_HOST").as_deref(),
                variable("KUBERNETES_SERVICE_PORT").as_deref(),
            )?,
        };
        let of_pod = |name: &str| in_pod.then(|| Path::new(ACCOUNT).join(name));
        let token = options.take("token_file").map(PathBuf::from).or_else(|| of_pod("token"));
        let authority = options.take("ca").map(PathBuf::from).or_else(|| of_pod("ca.crt"));
        let own = match (options.take("cert"), options.take("key")) {
            (Some(cert), Some(key)) => Some((PathBuf::from(cert), PathBuf::from(key))),
            (None, None) => None,
            _ => return Err("cert= and key= go together".to_owned()),
        };
        options.finish("server=, token_file=, ca=, cert=, key=")?;
        let files = tls::Files { authority, own };
        let client = http::client(server.starts_with("https").then_some(&files))?;
        Ok(Self { client, server, namespace: namespace.to_owned(), token })
    }

    fn collection(&self) -> String {
        let (server, namespace) = (&self.server, &self.namespace);
        format!("{server}/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases")
    }

    async fn ask(
        &self,
        method: Method,
        url: String,
        body: Option<&Value>,
    ) -> Result<Answered, Failure> {
        let mut request = self.client.request(method, url);
        if let Some(path) = &self.token {
            request = request.bearer_auth(secret(path).map_err(Failure::Refused)?);
        }
        if let Some(body) = body {
            request = request.header(CONTENT_TYPE, "application/json").body(body.to_string());
        }
        http::send(request).await
    }

    /// The object; `None` if there is none.
    async fn object(&self, key: &Key) -> Result<Option<Value>, Failure> {
        let answer =
            self.ask(Method::GET, format!("{}/{}", self.collection(), name(key)), None).await?;
        match answer.status {
            StatusCode::OK => serde_json::from_slice(&answer.body).map(Some).map_err(|_| {
                Failure::Refused(format!("it is no API server: it says {}", excerpt(&answer.body)))
            }),
            StatusCode::NOT_FOUND if reason(&answer) == "NotFound" => Ok(None),
            _ => Err(failure(&answer)),
        }
    }
}

/// An object's name: readable, and different for every key by a part of its SHA-256.
fn name(key: &Key) -> String {
    let path = key.path();
    let hash = ring::digest::digest(&ring::digest::SHA256, path.as_bytes());
    let mark: String = hash.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let readable: String = path.chars().map(|c| if c == '/' { '.' } else { c }).take(150).collect();
    // A label may neither begin nor end with a hyphen, and a machine's name may.
    let labels: Vec<&str> = readable.split('.').map(|label| label.trim_matches('-')).collect();
    let labels: Vec<&str> = labels.into_iter().filter(|label| !label.is_empty()).collect();
    format!("architect.{}.{mark}", labels.join("."))
}

fn reason(answer: &Answered) -> String {
    let said: Option<Value> = serde_json::from_slice(&answer.body).ok();
    said.and_then(|said| said["reason"].as_str().map(str::to_owned)).unwrap_or_default()
}

fn failure(answer: &Answered) -> Failure {
    let said: Option<Value> = serde_json::from_slice(&answer.body).ok();
    let said = said.and_then(|said| said["message"].as_str().map(str::to_owned));
    let detail = said.unwrap_or_else(|| excerpt(&answer.body));
    let detail = format!("the API server says {}: {detail}", answer.status);
    match answer.status {
        StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
            Failure::Silent { detail, after: answer.after }
        }
        status if status.is_client_error() => Failure::Refused(detail),
        _ => Failure::Silent { detail, after: answer.after },
    }
}

/// The content of an object.
fn content(key: &Key, object: &Value) -> Result<Vec<u8>, Failure> {
    let annotations = &object["metadata"]["annotations"];
    if annotations[WHOSE].as_str() != Some(key.path().as_str()) {
        let detail = format!("its annotation {WHOSE} is not \"{}\"", key.path());
        return Err(Failure::Damaged(detail));
    }
    let text = annotations[CONTENT].as_str();
    let text = text.ok_or_else(|| Failure::Damaged(format!("it has no annotation {CONTENT}")))?;
    match text.strip_prefix(ENCODED) {
        None => Ok(text.as_bytes().to_vec()),
        Some(encoded) => {
            STANDARD.decode(encoded).map_err(|e| Failure::Damaged(format!("no base64: {e}")))
        }
    }
}

/// What people see.
struct Shown {
    holder: String,
    changes: u64,
    term: Option<Duration>,
}

fn shown(key: &Key, bytes: &[u8]) -> Option<Shown> {
    match key {
        Key::Lease(_) => Record::decode(bytes).ok().map(|record| Shown {
            holder: record.owner.to_string(),
            changes: record.epoch.0.saturating_sub(1),
            term: None,
        }),
        Key::Beat(name) => Beat::decode(bytes).ok().map(|beat| Shown {
            holder: beat.fenced_by.unwrap_or_else(|| name.host().clone()).to_string(),
            changes: beat.of.incarnation.saturating_sub(1),
            term: Some(beat.term),
        }),
    }
}

/// The object with the new content; `before` keeps its labels, owners and version.
fn with_content(key: &Key, before: Option<Value>, bytes: &[u8], now: SystemTime) -> Value {
    let mut object = before.unwrap_or_else(|| {
        json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": { "name": name(key) },
        })
    });
    let text = match std::str::from_utf8(bytes) {
        Ok(text) if !text.starts_with(ENCODED) => text.to_owned(),
        _ => format!("{ENCODED}{}", STANDARD.encode(bytes)),
    };
    if !object["metadata"]["annotations"].is_object() {
        object["metadata"]["annotations"] = Value::Object(Map::new());
    }
    object["metadata"]["annotations"][CONTENT] = text.into();
    object["metadata"]["annotations"][WHOSE] = key.path().into();
    if !object["spec"].is_object() {
        object["spec"] = Value::Object(Map::new());
    }
    let spec = &mut object["spec"];
    let now = micro_time(now);
    if let Some(Shown { holder, changes, term }) = shown(key, bytes) {
        let changes = i32::try_from(changes).unwrap_or(i32::MAX);
        if spec["leaseTransitions"].as_i64() != Some(changes.into()) {
            spec["acquireTime"] = now.clone().into();
        }
        spec["holderIdentity"] = holder.into();
        spec["leaseTransitions"] = changes.into();
        if let Some(term) = term {
            // Whole seconds, at least one.
            let seconds = term.as_millis().div_ceil(1000).clamp(1, i32::MAX as u128);
            spec["leaseDurationSeconds"] = (seconds as i32).into();
        }
    }
    spec["renewTime"] = now.into();
    object
}

/// Kubernetes' `MicroTime`: RFC 3339 in UTC, with six digits.
fn micro_time(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since 1 March of year 0, in eras of 400 years (Howard Hinnant, chrono-compatible algorithms).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since.subsec_micros();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

impl Backend for Kubernetes {
    async fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, Failure> {
        self.object(key).await?.map(|object| content(key, &object)).transpose()
    }

    async fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, Failure> {
        let there = self.object(key).await?;
        let found = there.as_ref().map(|object| content(key, object)).transpose()?;
        if found.as_deref() != expected {
            return Ok(Swap::Found(found));
        }
        let (method, url) = match there {
            Some(_) => (Method::PUT, format!("{}/{}", self.collection(), name(key))),
            None => (Method::POST, self.collection()),
        };
        if there.as_ref().is_some_and(|o| !o["metadata"]["resourceVersion"].is_string()) {
            return Err(Failure::Refused("the API server gives no resourceVersion".to_owned()));
        }
        let object = with_content(key, there, new, SystemTime::now());
        let answer = self.ask(method.clone(), url, Some(&object)).await?;
        if answer.status.is_success() {
            return Ok(Swap::Done);
        }
        // Somebody has deleted it in between. After this as after a conflict the next try reads what is
        // there, which may be the expected content with another label.
        if method == Method::PUT && answer.status == StatusCode::NOT_FOUND {
            return Err(Failure::silent("it was deleted"));
        }
        Err(failure(&answer))
    }

    fn place(&self, key: &Key) -> String {
        format!("Lease {}/{} at {}", self.namespace, name(key), self.server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttemptId, BeatName, HostName, MachineName, Nonce};

    fn machine(name: &str) -> Key {
        Key::Lease(MachineName::new(name).unwrap())
    }

    #[test]
    fn every_key_has_a_name_that_kubernetes_takes() {
        let host = HostName::new(&["a"; 126].join(".")).unwrap();
        let long = MachineName::new(&"m".repeat(64)).unwrap();
        let keys = [
            machine("redis-1"),
            machine("-redis-1-"),
            machine("-"),
            Key::Beat(BeatName::of_host(host.clone())),
            Key::Beat(BeatName::of_runner(host, long)),
        ];
        let names: Vec<String> = keys.iter().map(name).collect();
        for (at, name) in names.iter().enumerate() {
            assert!(name.len() <= 253, "{name}");
            let fits =
                |label: &str| !label.is_empty() && !label.starts_with('-') && !label.ends_with('-');
            assert!(name.split('.').all(fits), "{name}");
            assert!(!names[..at].contains(name), "{name}");
        }
        assert!(names[0].starts_with("architect.lease.redis-1."), "{}", names[0]);
    }

    #[test]
    fn people_see_the_holder_and_the_term() {
        let now = UNIX_EPOCH + Duration::new(1_709_210_096, 123_456_000);
        let host = HostName::new("a").unwrap();
        let name = MachineName::new("redis-1").unwrap();
        let record = Record::first(name, host.clone(), AttemptId(1), Nonce(1));
        let taken = record.taken(HostName::new("b").unwrap(), AttemptId(2), Nonce(2));
        let key = machine("redis-1");
        let first = with_content(&key, None, &record.encode(), now);
        assert_eq!(first["spec"]["holderIdentity"], "a");
        assert_eq!(first["spec"]["renewTime"], "2024-02-29T12:34:56.123456Z");
        assert_eq!(content(&key, &first).unwrap(), record.encode());
        let mut before = first.clone();
        before["metadata"]["labels"] = json!({ "team": "blue" });
        let later = now + Duration::from_secs(1);
        let second = with_content(&key, Some(before), &taken.encode(), later);
        assert_eq!(second["spec"]["holderIdentity"], "b");
        assert_eq!(second["spec"]["leaseTransitions"], 1);
        assert_eq!(second["spec"]["acquireTime"], "2024-02-29T12:34:57.123456Z");
        assert_eq!(second["metadata"]["labels"]["team"], "blue");
        let beats = Key::Beat(BeatName::of_host(host.clone()));
        let term = Duration::from_millis(2500);
        let beat = Beat::begun(BeatName::of_host(host), None, term, Nonce(1));
        let shown = with_content(&beats, None, &beat.encode(), now);
        assert_eq!(shown["spec"]["leaseDurationSeconds"], 3);
        // Somebody else's object, or one that was edited.
        assert!(matches!(content(&machine("redis-2"), &first), Err(Failure::Damaged(_))));
        let mut edited = first;
        edited["metadata"]["annotations"][CONTENT] = Value::Null;
        assert!(matches!(content(&key, &edited), Err(Failure::Damaged(_))));
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_868_799, "2000-02-29T23:59:59.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            assert_eq!(micro_time(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn a_pod_finds_its_server_and_others_are_told_what_to_name() {
        assert_eq!(server_of_pod(Some("10.0.0.1"), Some("443")).unwrap(), "https://10.0.0.1:443");
        assert_eq!(server_of_pod(Some("fd00::1"), Some("443")).unwrap(), "https://[fd00::1]:443");
        let none = |_: &str| None;
        for (bad, says) in [
            ("//machines", "server="),
            ("//a,b?server=http://x", "several"),
            ("//Machines?server=http://x", "no namespace"),
            ("//machines/x?server=http://x", "NAMESPACE"),
            ("//machines?server=10.0.0.1", "https://"),
            ("//machines?server=http://x&colour=red", "colour="),
            ("//machines?server=https://x&ca=/nowhere", "/nowhere"),
        ] {
            let e = Kubernetes::new(bad, none).err().unwrap();
            assert!(e.contains(says), "{bad}: {e}");
        }
    }
}
