//! Requests to stores that speak HTTP: bounded answers, no proxy, no redirect.

use super::{
    remote::{Failure, chain},
    tls,
};
use reqwest::{Client, RequestBuilder, StatusCode, header::RETRY_AFTER, redirect::Policy};
use std::time::Duration;

/// No answer is longer: a cell, encoded, with what is around it.
const LONGEST_ANSWER: usize = 1 << 20;

/// Longest time for a connection to come about.
const CONNECT: Duration = Duration::from_secs(1);

/// A store's answer.
pub(crate) struct Answered {
    pub(crate) status: StatusCode,
    pub(crate) body: Vec<u8>,
    /// How long to wait, if it says so.
    pub(crate) after: Option<Duration>,
}

/// A client, without a connection yet.
pub(crate) fn client(files: Option<&tls::Files>) -> Result<Client, String> {
    // Also without TLS reqwest wants to know whose it would be.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = Client::builder()
        .no_proxy()
        .redirect(Policy::none())
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .user_agent("architect");
    let builder = match files {
        Some(files) => builder.tls_backend_preconfigured(tls::client(files)?),
        None => builder,
    };
    builder.build().map_err(|e| format!("make an HTTP client: {}", chain(&e)))
}

/// Sends it, and reads the answer whole.
pub(crate) async fn send(request: RequestBuilder) -> Result<Answered, Failure> {
    let failed = |error: reqwest::Error| {
        let error = error.without_url();
        let detail = chain(&error);
        if tls::refused(&error) { Failure::Refused(detail) } else { Failure::silent(detail) }
    };
    let mut answer = request.send().await.map_err(failed)?;
    let status = answer.status();
    let seconds = answer.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok());
    let mut body = Vec::new();
    while let Some(piece) = answer.chunk().await.map_err(failed)? {
        if body.len() + piece.len() > LONGEST_ANSWER {
            return Err(Failure::Refused(format!(
                "its answer has more than {LONGEST_ANSWER} bytes"
            )));
        }
        body.extend_from_slice(&piece);
    }
    Ok(Answered { status, body, after: seconds.map(Duration::from_secs) })
}

/// The beginning of an answer, for people.
pub(crate) fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(300)]);
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
