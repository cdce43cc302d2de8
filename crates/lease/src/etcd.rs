//! Leases in etcd (3.4 and later), by its JSON gateway.
//!
//! A swap is one transaction, which compares and sets or says what is there; a read is one range
//! request. Both go through a quorum (no request is "serializable"), which is what makes them
//! linearizable, whatever member is asked. etcd's own leases are not used: they end when etcd thinks so.

use super::{
    Key, Swap,
    address::{Address, secret},
    http::{self, Answered, excerpt},
    remote::{Backend, Failure},
    tls,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{
    Client,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

const PORT: &str = ":2379";

/// Codes of gRPC after which trying again does not help.
const INVALID_ARGUMENT: i64 = 3;
const PERMISSION_DENIED: i64 = 7;
const UNIMPLEMENTED: i64 = 12;
const UNAUTHENTICATED: i64 = 16;

struct Login {
    user: String,
    password_file: PathBuf,
}

/// Some members of one etcd.
pub(crate) struct Etcd {
    client: Client,
    /// `http://host:port` of each.
    members: Vec<String>,
    /// The one that answered last; the next one is tried when it does not.
    next: AtomicUsize,
    prefix: String,
    login: Option<Login>,
    token: Mutex<Option<String>>,
}

impl Etcd {
    /// Makes no request yet. `rest` follows the scheme: `//[user@]host:port[,host:port…][/prefix]`, with
    /// `tls=yes`, `ca=FILE`, `cert=FILE` and `key=FILE`, `password_file=FILE`.
    pub(crate) fn new(rest: &str) -> Result<Self, String> {
        let Address { user, hosts, path, mut options } = Address::parse(rest)?;
        let authority = options.take("ca").map(PathBuf::from);
        let own = match (options.take("cert"), options.take("key")) {
            (Some(cert), Some(key)) => Some((PathBuf::from(cert), PathBuf::from(key))),
            (None, None) => None,
            _ => return Err("cert= and key= go together".to_owned()),
        };
        let encrypted = match options.take("tls") {
            Some("yes") => true,
            None => authority.is_some() || own.is_some(),
            Some(_) => return Err("tls= takes yes only".to_owned()),
        };
        let password_file = options.take("password_file").map(PathBuf::from);
        options.finish("tls=yes, ca=, cert=, key=, password_file=")?;
        let login = match (user, password_file) {
            (Some(user), Some(password_file)) => {
                Some(Login { user: user.to_owned(), password_file })
            }
            (None, None) => None,
            _ => return Err("user@ and password_file= go together".to_owned()),
        };
        let files = tls::Files { authority, own };
        let scheme = if encrypted { "https" } else { "http" };
        let member = |host: &&str| {
            // An IPv6 address has colons of its own, in brackets.
            let has_port = host.rsplit_once(':').is_some_and(|(_, port)| !port.contains(']'));
            format!("{scheme}://{host}{}", if has_port { "" } else { PORT })
        };
        Ok(Self {
            client: http::client(encrypted.then_some(&files))?,
            members: hosts.iter().map(member).collect(),
            next: AtomicUsize::new(0),
            prefix: if path.is_empty() { "architect".to_owned() } else { path.to_owned() },
            login,
            token: Mutex::new(None),
        })
    }

    fn name(&self, key: &Key) -> String {
        format!("{}/{}", self.prefix, key.path())
    }

    fn token(&self) -> MutexGuard<'_, Option<String>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request to one member.
    async fn post(
        &self,
        member: &str,
        path: &str,
        body: &Value,
        token: Option<&str>,
    ) -> Result<Value, Failure> {
        let request = self
            .client
            .post(format!("{member}{path}"))
            .header(CONTENT_TYPE, "application/json")
            .body(body.to_string());
        let request = match token {
            Some(token) => request.header(AUTHORIZATION, token),
            None => request,
        };
        let Answered { status, body, after } = http::send(request).await.map_err(|e| match e {
            Failure::Silent { detail, after } => {
                Failure::Silent { detail: format!("{member}: {detail}"), after }
            }
            Failure::Refused(detail) => Failure::Refused(format!("{member}: {detail}")),
            other @ Failure::Damaged(_) => other,
        })?;
        let said: Option<Value> = serde_json::from_slice(&body).ok();
        if status.is_success() {
            return said.ok_or_else(|| {
                Failure::Refused(format!("{member} is no etcd: it says {}", excerpt(&body)))
            });
        }
        let code = said.as_ref().and_then(|said| said["code"].as_i64());
        let what = said.as_ref().and_then(|said| said["error"].as_str());
        let what = what.map_or_else(|| excerpt(&body), str::to_owned);
        let detail = format!("{member}: {what} ({status})");
        match code {
            Some(UNAUTHENTICATED) => {
                // A token that has expired; the next try gets another.
                *self.token() = None;
                Err(Failure::silent(detail))
            }
            Some(INVALID_ARGUMENT | PERMISSION_DENIED | UNIMPLEMENTED) => {
                Err(Failure::Refused(detail))
            }
            None if status.is_client_error() => {
                Err(Failure::Refused(format!("{detail}; is it etcd 3.4 or newer?")))
            }
            _ => Err(Failure::Silent { detail, after }),
        }
    }

    async fn authenticated(&self, member: &str) -> Result<Option<String>, Failure> {
        let Some(login) = &self.login else { return Ok(None) };
        if let Some(token) = self.token().clone() {
            return Ok(Some(token));
        }
        let password = secret(&login.password_file).map_err(Failure::Refused)?;
        let body = json!({ "name": login.user, "password": password });
        let answer = self.post(member, "/v3/auth/authenticate", &body, None).await?;
        let token = answer["token"].as_str().map(str::to_owned);
        let token = token.ok_or_else(|| {
            Failure::Refused(format!("{member} gave user \"{}\" no token", login.user))
        })?;
        *self.token() = Some(token.clone());
        Ok(Some(token))
    }

    async fn ask(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        // Whoever is given up here has been left behind by then.
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        let member = &self.members[at % self.members.len()];
        let token = self.authenticated(member).await?;
        let answer = self.post(member, path, body, token.as_deref()).await?;
        self.next.store(at, Ordering::Relaxed);
        Ok(answer)
    }
}

/// The value in an answer to a range request.
fn value(range: &Value) -> Result<Option<Vec<u8>>, Failure> {
    let Some(found) = range["kvs"].as_array().and_then(|kvs| kvs.first()) else { return Ok(None) };
    // Empty values are left out.
    let text = found["value"].as_str().unwrap_or("");
    let bytes = STANDARD.decode(text);
    bytes.map(Some).map_err(|e| Failure::silent(format!("its answer is no base64: {e}")))
}

impl Backend for Etcd {
    async fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, Failure> {
        let name = STANDARD.encode(self.name(key));
        value(&self.ask("/v3/kv/range", &json!({ "key": name })).await?)
    }

    async fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, Failure> {
        let name = STANDARD.encode(self.name(key));
        let compare = match expected {
            Some(content) => json!({
                "key": name, "target": "VALUE", "result": "EQUAL", "value": STANDARD.encode(content),
            }),
            // A key that is not there was created at no revision.
            None => json!({
                "key": name, "target": "CREATE", "result": "EQUAL", "create_revision": "0",
            }),
        };
        let transaction = json!({
            "compare": [compare],
            "success": [{ "request_put": { "key": name, "value": STANDARD.encode(new) } }],
            "failure": [{ "request_range": { "key": name } }],
        });
        let answer = self.ask("/v3/kv/txn", &transaction).await?;
        if answer["succeeded"].as_bool() == Some(true) {
            return Ok(Swap::Done);
        }
        let range = &answer["responses"][0]["response_range"];
        if !range.is_object() {
            return Err(Failure::Refused(format!("it is no etcd: it says {answer}")));
        }
        Ok(Swap::Found(value(range)?))
    }

    fn place(&self, key: &Key) -> String {
        format!("{} in etcd at {}", self.name(key), self.members.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_members_and_a_prefix() {
        let etcd = Etcd::new("//a,b:1,[::1],[::1]:7/x/y").unwrap();
        assert_eq!(
            etcd.members,
            ["http://a:2379", "http://b:1", "http://[::1]:2379", "http://[::1]:7"]
        );
        assert_eq!(etcd.prefix, "x/y");
        assert_eq!(Etcd::new("//a").unwrap().prefix, "architect");
        for (bad, says) in [
            ("//a?cert=/x", "go together"),
            ("//me@a", "go together"),
            ("//a?tls=no", "yes only"),
            ("//a?colour=red", "colour="),
            ("//a?ca=/nowhere", "/nowhere"),
        ] {
            let e = Etcd::new(bad).err().unwrap();
            assert!(e.contains(says), "{bad}: {e}");
        }
    }
}
