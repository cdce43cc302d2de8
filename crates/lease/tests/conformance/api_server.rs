//! An API server that knows Leases, as far as stores of leases need one: versions of objects, conflicts,
//! names and fields checked as the real one does, tokens, TLS. What goes wrong is scripted.

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header,
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use identity::{Authority, HostName};
use lease_testing::secret_file;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig, crypto,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

/// What goes wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    Fine,
    /// Answered with this status; nothing is done.
    Status(u16),
    /// 429, with the request to come back in no time.
    TooMany,
    /// Somebody has changed a label in between, so that a write meets a conflict.
    Relabelled,
    /// The connection breaks; nothing is done.
    CutBefore,
    /// It is done, and the connection breaks.
    CutAfter,
    /// It is done, and answered so much later.
    Slow(Duration),
}

struct State {
    leases: BTreeMap<String, Value>,
    version: u64,
    /// Gone through again and again.
    script: Vec<Fault>,
    at: usize,
    requests: u64,
}

/// It ends when it is dropped.
pub(crate) struct ApiServer {
    /// Of a store in it.
    pub(crate) address: String,
    pub(crate) port: u16,
    pub(crate) authority: PathBuf,
    state: Arc<Mutex<State>>,
    runtime: Option<Runtime>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Of the certificate: longer than a test.
const VALID: Duration = Duration::from_secs(24 * 60 * 60);
const TOKEN: &str = "a pod's token";
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/machines/leases";

impl ApiServer {
    pub(crate) fn start(folder: &Path) -> Self {
        let dir = folder.join("authority");
        let issuer = Authority::create(&dir).unwrap();
        issuer.issue(&HostName::new("localhost").unwrap(), VALID).unwrap();
        let chain: Vec<_> = CertificateDer::pem_file_iter(dir.join("localhost.crt"))
            .unwrap()
            .collect::<Result<_, _>>()
            .unwrap();
        let key = PrivateKeyDer::from_pem_file(dir.join("localhost.key")).unwrap();
        let provider = Arc::new(crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let state = State {
            leases: BTreeMap::new(),
            version: 0,
            script: vec![Fault::Fine],
            at: 0,
            requests: 0,
        };
        let state = Arc::new(Mutex::new(state));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0))).unwrap();
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(serve(listener, acceptor, Arc::clone(&state)));
        let token = secret_file(folder, "token", TOKEN);
        let authority = dir.join("ca.crt");
        let address = format!(
            "kubernetes://machines?server=https://localhost:{port}&token_file={token}&ca={}",
            authority.display()
        );
        Self { address, port, authority, state, runtime: Some(runtime) }
    }

    /// From now on.
    pub(crate) fn script(&self, script: &[Fault]) {
        let mut state = self.state.lock().unwrap();
        (state.script, state.at) = (script.to_vec(), 0);
    }

    pub(crate) fn requests(&self) -> u64 {
        self.state.lock().unwrap().requests
    }

    /// The objects, as `kubectl get leases -o json` shows them.
    pub(crate) fn leases(&self) -> Vec<Value> {
        self.state.lock().unwrap().leases.values().cloned().collect()
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor, state: Arc<Mutex<State>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, state) = (acceptor.clone(), Arc::clone(&state));
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = service_fn(move |request| answer(Arc::clone(&state), request));
            // A client that went away is its own affair.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

type Answer = Response<Full<Bytes>>;

fn says(status: u16, body: &Value) -> Answer {
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn status(code: u16, reason: &str, message: &str) -> Answer {
    says(code, &json!({ "kind": "Status", "code": code, "reason": reason, "message": message }))
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> io::Result<Answer> {
    let cut = || Err(io::Error::new(io::ErrorKind::ConnectionReset, "cut by a test"));
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let fault = {
        let mut state = state.lock().unwrap();
        state.requests += 1;
        state.at += 1;
        state.script[(state.at - 1) % state.script.len()]
    };
    match fault {
        Fault::CutBefore => return cut(),
        Fault::Status(code) => return Ok(status(code, "Scripted", "as a test wants it")),
        Fault::TooMany => {
            let mut response = status(429, "TooManyRequests", "slow down");
            response.headers_mut().insert(header::RETRY_AFTER, "0".parse().unwrap());
            return Ok(response);
        }
        Fault::Relabelled if parts.method == Method::PUT => {
            let mut state = state.lock().unwrap();
            state.version += 1;
            let version = state.version.to_string();
            for object in state.leases.values_mut() {
                object["metadata"]["labels"]["version"] = version.clone().into();
                object["metadata"]["resourceVersion"] = version.clone().into();
            }
        }
        _ => {}
    }
    let wanted = format!("Bearer {TOKEN}");
    let given = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let response = if given == Some(wanted.as_str()) {
        let mut state = state.lock().unwrap();
        state.answer(&parts.method, parts.uri.path(), &body)
    } else {
        status(401, "Unauthorized", "Unauthorized")
    };
    match fault {
        Fault::CutAfter => return cut(),
        Fault::Slow(by) => tokio::time::sleep(by).await,
        _ => {}
    }
    Ok(response)
}

/// RFC 1123, as Kubernetes checks names.
fn is_subdomain(name: &str) -> bool {
    let label = |label: &str| {
        let clean = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && label.bytes().all(clean)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// What the real one refuses in a Lease.
fn invalid(object: &Value) -> Option<String> {
    let name = object["metadata"]["name"].as_str().unwrap_or("");
    if !is_subdomain(name) {
        return Some(format!("metadata.name: {name}"));
    }
    let spec = &object["spec"];
    for (field, least) in [("leaseDurationSeconds", 1), ("leaseTransitions", 0)] {
        let value = &spec[field];
        if !value.is_null() && value.as_i64().is_none_or(|n| n < least) {
            return Some(format!("spec.{field}: {value}"));
        }
    }
    for field in ["renewTime", "acquireTime"] {
        let value = &spec[field];
        let fits =
            |text: &str| text.len() == "2026-01-01T00:00:00.000000Z".len() && text.ends_with('Z');
        if !value.is_null() && !value.as_str().is_some_and(fits) {
            return Some(format!("spec.{field}: {value}"));
        }
    }
    let annotations = object["metadata"]["annotations"].as_object().into_iter().flatten();
    let size: usize = annotations.map(|(k, v)| k.len() + v.as_str().unwrap_or("").len()).sum();
    (size > 256 * 1024).then(|| "metadata.annotations: too long".to_owned())
}

impl State {
    fn store(&mut self, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        self.leases.insert(name, object.clone());
        object
    }

    fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> Answer {
        let Some(rest) = path.strip_prefix(LEASES) else {
            return status(403, "Forbidden", &format!("leases is forbidden: {path}"));
        };
        let name = rest.trim_start_matches('/');
        let missing = || status(404, "NotFound", &format!("leases \"{name}\" not found"));
        if *method == Method::GET {
            return self.leases.get(name).map_or_else(missing, |object| says(200, object));
        }
        let Ok(object) = serde_json::from_slice::<Value>(body) else {
            return status(400, "BadRequest", "no JSON");
        };
        if let Some(what) = invalid(&object) {
            return status(422, "Invalid", &what);
        }
        let own = object["metadata"]["name"].as_str().unwrap().to_owned();
        let version = &object["metadata"]["resourceVersion"];
        match *method {
            Method::POST if name.is_empty() => {
                if self.leases.contains_key(&own) {
                    return status(
                        409,
                        "AlreadyExists",
                        &format!("leases \"{own}\" already exists"),
                    );
                }
                if !version.is_null() {
                    return status(400, "BadRequest", "resourceVersion should not be set");
                }
                says(201, &self.store(object))
            }
            Method::PUT if own == name => match self.leases.get(name) {
                None => missing(),
                Some(there) if there["metadata"]["resourceVersion"] != *version => status(
                    409,
                    "Conflict",
                    &format!("Operation cannot be fulfilled on leases \"{name}\": modified"),
                ),
                Some(_) => says(200, &self.store(object)),
            },
            _ => status(405, "MethodNotAllowed", "no"),
        }
    }
}
