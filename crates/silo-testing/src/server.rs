//! `s3s-fs` behind hyper, on a port of the loopback, over a folder that vanishes with it.
//!
//! s3s-fs 0.14 checks conditions without a lock: two creates of one object could both win, and a reader
//! could see a new object with the old one's ETag. Here conditional puts go one after the other, and
//! nobody reads meanwhile. A request whose client goes away would be left where it is, its object
//! written and the ETag not; here it is done all the same, as by any real server. s3s-fs also reads files 4 KiB at a time, each by way of another
//! thread; here the bodies of its answers to GET come from the same file in larger pieces.

use crate::faults::{Fault, Faults, Request, file_of};
use bytes::Bytes;
use http_body_util::{BodyExt, StreamBody};
use hyper::{
    Response, StatusCode,
    body::{Frame, Incoming},
    header,
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use s3s::{
    Body, HttpError,
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::RwLock,
    task::{JoinHandle, JoinSet},
};

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
#[error("the S3 server for tests did not start: could not {operation}: {detail}")]
pub struct ServerError {
    operation: &'static str,
    detail: String,
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> ServerError {
    move |error| ServerError { operation, detail: error.to_string() }
}

/// A running server. It ends when it is dropped.
pub struct S3Server {
    address: SocketAddr,
    folder: tempfile::TempDir,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
    /// Accepts; none while the server is away.
    serving: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

struct Shared {
    service: S3Service,
    faults: Faults,
    root: PathBuf,
    /// Held alone by whoever makes a conditional put, and by readers together.
    conditional: RwLock<()>,
}

impl S3Server {
    /// The bucket that is there.
    pub const BUCKET: &'static str = "bucket";
    const ACCESS: &'static str = "silo-test-access";
    const SECRET: &'static str = "silo-test-secret";

    /// Starts a server over a new folder in `parent`.
    ///
    /// # Errors
    /// If there is no folder or port.
    pub fn start(parent: &Path) -> Result<Self, ServerError> {
        Self::start_at(parent, Ipv4Addr::LOCALHOST.into())
    }

    /// As [`S3Server::start`], at an address of this thread's network namespace: for clients in others.
    ///
    /// # Errors
    /// If there is no folder or port, or nobody here has the address.
    pub fn start_at(parent: &Path, address: IpAddr) -> Result<Self, ServerError> {
        let folder = tempfile::Builder::new()
            .prefix("s3-")
            .tempdir_in(parent)
            .map_err(failed("make a folder"))?;
        let root = folder.path().to_owned();
        std::fs::create_dir(root.join(Self::BUCKET)).map_err(failed("make a bucket"))?;
        let files = s3s_fs::FileSystem::new(&root).map_err(|error| ServerError {
            operation: "open the folder",
            detail: format!("{error:?}"),
        })?;
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(Self::ACCESS, Self::SECRET));
        let shared = Arc::new(Shared {
            service: builder.build(),
            faults: Faults::default(),
            root,
            conditional: RwLock::new(()),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("s3-server")
            .enable_all()
            .build()
            .map_err(failed("start threads"))?;
        // Here and now, where the address is.
        let listener = std::net::TcpListener::bind((address, 0))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(failed("listen"))?;
        let inside = runtime.enter();
        let listener = TcpListener::from_std(listener).map_err(failed("listen"))?;
        drop(inside);
        let address = listener.local_addr().map_err(failed("ask for the port"))?;
        let serving = std::sync::Mutex::new(Some(runtime.spawn(serve(listener, shared.clone()))));
        Ok(Self { address, folder, shared, runtime: Some(runtime), serving })
    }

    fn serving(&self) -> std::sync::MutexGuard<'_, Option<JoinHandle<()>>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes all connections and the port: nobody is there any more. What is stored stays, with all
    /// conditional puts that came before.
    pub fn go_away(&self) {
        let (serving, runtime) = (self.serving().take(), &self.runtime);
        if let (Some(serving), Some(runtime)) = (serving, runtime) {
            serving.abort();
            // An error is what ends it: it was aborted.
            let _ = runtime.block_on(serving);
            drop(runtime.block_on(self.shared.conditional.write()));
        }
    }

    /// Is there again, on the same port.
    ///
    /// # Errors
    /// If somebody else has taken the port.
    pub fn come_back(&self) -> Result<(), ServerError> {
        let mut serving = self.serving();
        if let (None, Some(runtime)) = (&*serving, &self.runtime) {
            let listener = runtime.block_on(TcpListener::bind(self.address));
            let listener = listener.map_err(failed("listen on the same port"))?;
            *serving = Some(runtime.spawn(serve(listener, self.shared.clone())));
        }
        Ok(())
    }

    /// Address of a folder in the bucket, as `silo` takes it.
    #[must_use]
    pub fn url(&self, folder: &str) -> String {
        format!("s3://{}/{folder}?endpoint={}&region=us-east-1", Self::BUCKET, self.endpoint())
    }

    /// Address of the server.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Variables with credentials that it takes.
    #[must_use]
    pub fn credentials(&self) -> [(&'static str, &'static str); 2] {
        [("AWS_ACCESS_KEY_ID", Self::ACCESS), ("AWS_SECRET_ACCESS_KEY", Self::SECRET)]
    }

    /// Where a test says what goes wrong.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// The file that holds an object.
    #[must_use]
    pub fn file(&self, key: &str) -> PathBuf {
        file_of(self.folder.path(), Self::BUCKET, key)
    }
}

/// Accepts connections; all of them end with it.
async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let shared = shared.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let shared = shared.clone();
                async move { shared.answer(request).await }
            });
            // A client that went away is its own affair.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

impl Shared {
    async fn answer(
        self: Arc<Self>,
        request: hyper::Request<Incoming>,
    ) -> Result<Response<Body>, HttpError> {
        let method = request.method().as_str().to_owned();
        let path = request.uri().to_string();
        let creates = request.headers().contains_key(header::IF_NONE_MATCH);
        let conditional = creates || request.headers().contains_key(header::IF_MATCH);
        let range = request.headers().get(header::RANGE).cloned();
        let is_object = request.uri().query().is_none_or(|query| !query.contains("list-type"));
        let file = self.root.join(request.uri().path().trim_start_matches('/'));
        // s3s-fs takes objects into buckets that do not exist.
        let bucket = request.uri().path().trim_start_matches('/').split('/').next().unwrap_or("");
        if !bucket.is_empty() && !self.root.join(bucket).is_dir() {
            return Ok(no_such_bucket());
        }
        let fault = self.faults.meet(Request { method: method.clone(), path, creates });
        if fault
            .as_ref()
            .is_some_and(|fault| !matches!(fault, Fault::NoAnswer | Fault::LostAnswer(_)))
        {
            self.faults.note();
        }
        match &fault {
            Some(Fault::Slow(by)) => tokio::time::sleep(*by).await,
            Some(Fault::Hangs) => std::future::pending().await,
            Some(Fault::Status(status)) => {
                // The body is taken, as a server does that fails at the end of its work.
                let _ = request.into_body().collect().await;
                return Ok(status_only(*status));
            }
            Some(Fault::Stale(key)) => {
                let file = file_of(&self.root, S3Server::BUCKET, key);
                return Ok(file_as_answer(&file, range.as_ref().and_then(|r| r.to_str().ok())));
            }
            Some(Fault::LostAnswer(_) | Fault::NoAnswer | Fault::Truncated | Fault::WrongBytes)
            | None => {}
        }
        // A task of its own: this one ends where its client goes away.
        let shared = Arc::clone(&self);
        let work = async move {
            let (mut alone, mut together) = (None, None);
            match method.as_str() {
                "PUT" if conditional => alone = Some(shared.conditional.write().await),
                "GET" => together = Some(shared.conditional.read().await),
                _ => {}
            }
            let response = shared.service.call(request.map(Body::from)).await?;
            let is_read = method == "GET" && is_object && response.status().is_success();
            let response = if is_read { in_larger_pieces(response, &file) } else { response };
            drop((alone, together));
            Ok::<_, HttpError>(response)
        };
        let response = tokio::spawn(work).await.map_err(|e| HttpError::new(e.into()))??;
        Ok(match fault {
            Some(Fault::LostAnswer(status)) => {
                self.faults.note();
                status_only(status)
            }
            Some(Fault::NoAnswer) => {
                self.faults.note();
                std::future::pending().await
            }
            Some(Fault::Truncated) => {
                let (parts, body) = response.into_parts();
                let bytes = body.collect().await.map(http_body_util::Collected::to_bytes);
                let bytes = bytes.unwrap_or_default();
                // The header still says the whole length; the connection breaks in the middle.
                let half = bytes.slice(..bytes.len() / 2);
                let broken = io::Error::new(io::ErrorKind::ConnectionReset, "cut by a test");
                let frames = [Ok(Frame::data(half)), Err(broken)];
                let body = StreamBody::new(futures::stream::iter(frames));
                Response::from_parts(parts, Body::http_body(body))
            }
            Some(Fault::WrongBytes) => {
                let (parts, body) = response.into_parts();
                let bytes = body.collect().await.map(http_body_util::Collected::to_bytes);
                let mut bytes = bytes.unwrap_or_default().to_vec();
                let middle = bytes.len() / 2;
                if let Some(byte) = bytes.get_mut(middle) {
                    *byte ^= 1;
                }
                Response::from_parts(parts, Body::from(bytes))
            }
            _ => response,
        })
    }
}

/// The same answer, its body read from the file in pieces that are worth a system call.
fn in_larger_pieces(response: Response<Body>, file: &Path) -> Response<Body> {
    const PIECE: u64 = 256 << 10;
    let number =
        |name: header::HeaderName| response.headers().get(name)?.to_str().ok().map(str::to_owned);
    let length = number(header::CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
    let start = match number(header::CONTENT_RANGE) {
        None => Some(0),
        Some(text) => text
            .strip_prefix("bytes ")
            .and_then(|text| text.split_once('-'))
            .and_then(|(start, _)| start.parse().ok()),
    };
    let opened = std::fs::File::open(file);
    let (Some(length), Some(start), Ok(opened)) = (length, start, opened) else { return response };
    let stream =
        futures::stream::try_unfold((opened, start, length), |(file, at, left)| async move {
            if left == 0 {
                return Ok::<_, io::Error>(None);
            }
            // From the page cache as a rule; a pool of threads costs more than the copy.
            let mut piece = vec![0; left.min(PIECE) as usize];
            file.read_exact_at(&mut piece, at)?;
            let count = piece.len() as u64;
            Ok(Some((Frame::data(Bytes::from(piece)), (file, at + count, left - count))))
        });
    let (parts, _) = response.into_parts();
    Response::from_parts(parts, Body::http_body_unsync(StreamBody::new(stream)))
}

fn no_such_bucket() -> Response<Body> {
    let text =
        "<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist</Message></Error>";
    let mut response = Response::new(Body::from(text.to_owned()));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response
}

fn status_only(status: u16) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response
}

/// Answers with a file, or the part of it that a range header asks for.
fn file_as_answer(file: &Path, range: Option<&str>) -> Response<Body> {
    let Ok(content) = std::fs::read(file) else { return status_only(404) };
    let length = content.len();
    let wanted = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    let wanted = wanted.and_then(|(from, to)| {
        let (from, to) = (from.parse::<usize>().ok()?, to.parse::<usize>().ok()?);
        (from < length).then(|| from..(to + 1).min(length))
    });
    let mut response = match wanted {
        None => Response::new(Body::from(content)),
        Some(range) => {
            let about = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            let mut response = Response::new(Body::from(Bytes::from(content).slice(range)));
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            if let Ok(about) = about.parse() {
                response.headers_mut().insert(header::CONTENT_RANGE, about);
            }
            response
        }
    };
    for (name, value) in
        [(header::ETAG, "\"stale\""), (header::LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT")]
    {
        response.headers_mut().insert(name, header::HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;
    use object_store::{ObjectStoreExt, PutMode, PutOptions, UpdateVersion};
    use std::{collections::HashMap, time::Duration};

    /// Clients that give up at any moment of their put: what is read with one `ETag` is one content.
    #[test]
    fn a_put_whose_client_went_away_is_done_or_not_and_never_half() {
        const ROUNDS: u32 = 300;
        let parent = tempfile::tempdir().unwrap();
        let server = S3Server::start(parent.path()).unwrap();
        let credentials = bucket::Environment::given(server.credentials());
        let url: bucket::StoreUrl = server.url("lease").parse().unwrap();
        let store = url.open(&credentials, Duration::from_secs(20)).unwrap().store;
        let path = object_store::path::Path::from("lease/one");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            store.put(&path, "0".into()).await.unwrap();
            let (mut known, mut longest) = (HashMap::new(), Duration::from_millis(1));
            let (mut given_up, mut done) = (0, 0);
            for round in 1..=ROUNDS {
                let there = store.get(&path).await.unwrap();
                let version = there.meta.e_tag.clone().unwrap();
                let content = there.bytes().await.unwrap();
                let first = known.entry(version.clone()).or_insert_with(|| content.clone());
                assert_eq!(*first, content, "round {round}: two contents have {version}");
                let condition = UpdateVersion { e_tag: Some(version), version: None };
                let options = PutOptions::from(PutMode::Update(condition));
                let put = store.put_opts(&path, format!("{round}").into(), options);
                let begun = std::time::Instant::now();
                match tokio::time::timeout(longest * (round % 16) / 16, put).await {
                    // One that was given up was done after the look.
                    Ok(Err(object_store::Error::Precondition { .. })) => {}
                    Ok(answer) => {
                        answer.unwrap();
                        done += 1;
                        longest = begun.elapsed();
                    }
                    Err(_) => {
                        given_up += 1;
                        longest += Duration::from_micros(50);
                    }
                }
            }
            assert!(given_up > ROUNDS / 4, "{given_up} given up, {done} done");
        });
    }
}
