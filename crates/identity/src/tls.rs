//! One host's identity, checked when loaded, and the TLS settings made of it.
//!
//! TLS 1.3 only, ring as the provider (named, never the process default), no resumption: a move
//! opens few connections and keeps them, and a ticket would outlive its certificate.

use crate::{
    Error, HostName, Result,
    authority::REVOKED,
    files::{self, Stamp},
};
use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
        pem::PemObject,
    },
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The authority's certificate in a folder of PEM files as QEMU, nbdkit and libnbd use them.
pub(crate) const PEM_AUTHORITY: &str = "ca-cert.pem";
const PEM_HINT: &str = "QEMU, nbdkit and libnbd call the files in such a folder ca-cert.pem, \
                        server-cert.pem, server-key.pem, client-cert.pem and client-key.pem";

/// The authority's certificate in a host's own folder.
const AUTHORITY: &str = "ca.crt";
/// The most bytes of a list of revoked certificates: some 100,000 of them.
const MAX_REVOKED: u64 = 8 << 20;

const HINT: &str = "issue one with the authority and copy it here";

/// One host's certificate, private key and trusted authority. Cheap to clone.
///
/// Files that change are read again before the next handshake, by whoever of the clones makes it: a
/// certificate that is renewed in place counts without a restart. As long as the new files do not fit
/// together (half of them copied, say) the old ones count, and a warning says why.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    name: HostName,
    dir: PathBuf,
    authority: PathBuf,
    current: Mutex<Current>,
}

/// What was read last.
struct Current {
    stamps: [Stamp; 4],
    settings: Settings,
    /// Why what is there now is not in use.
    trouble: Option<String>,
}

/// Made of one reading of the files.
#[derive(Clone)]
struct Settings {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.inner.name)
    }
}

impl Identity {
    /// Reads `ca.crt`, `NAME.crt` and `NAME.key` from `dir`, and `revoked.crl` if there is one, and
    /// checks them against each other, against the name and against the clock.
    ///
    /// # Errors
    /// Says which file is missing, damaged, expired, revoked, for another name or from another
    /// authority.
    pub fn load(dir: &Path, name: &HostName) -> Result<Self> {
        Self::load_at(dir, name, SystemTime::now())
    }

    /// As [`Identity::load`], with the time to check against. The handshakes use the real clock.
    ///
    /// # Errors
    /// As [`Identity::load`].
    pub fn load_at(dir: &Path, name: &HostName, at: SystemTime) -> Result<Self> {
        // Before they are read: a change meanwhile is found by the next look.
        let stamps = stamps(dir, name);
        let settings = Settings::read(dir, name, at)?;
        Ok(Self {
            inner: Arc::new(Inner {
                name: name.clone(),
                dir: dir.to_owned(),
                authority: dir.join(AUTHORITY),
                current: Mutex::new(Current { stamps, settings, trouble: None }),
            }),
        })
    }

    /// This host's name.
    #[must_use]
    pub fn name(&self) -> &HostName {
        &self.inner.name
    }

    /// Why the files as they are now are not in use, if they are not.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.refresh().trouble.clone()
    }

    pub(crate) fn authority(&self) -> &Path {
        &self.inner.authority
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.refresh().settings.client.clone()
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        self.refresh().settings.server.clone()
    }

    /// Looks whether the files are others than before, and reads them if so.
    fn refresh(&self) -> MutexGuard<'_, Current> {
        let Inner { name, dir, current, .. } = &*self.inner;
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(dir, name);
        if stamps != current.stamps {
            current.stamps = stamps;
            match Settings::read(dir, name, SystemTime::now()) {
                Ok(settings) => {
                    tracing::info!(host = %name, dir = %dir.display(), "certificates were read again");
                    (current.settings, current.trouble) = (settings, None);
                }
                Err(error) => {
                    let why = error.to_string();
                    tracing::warn!(host = %name, why, "new certificates are not used; the old ones are");
                    current.trouble = Some(why);
                }
            }
        }
        current
    }
}

fn stamps(dir: &Path, name: &HostName) -> [Stamp; 4] {
    let own = |end| dir.join(format!("{name}.{end}"));
    [dir.join(AUTHORITY), dir.join(REVOKED), own("crt"), own("key")].map(|path| files::stamp(&path))
}

impl Settings {
    fn read(dir: &Path, name: &HostName, at: SystemTime) -> Result<Self> {
        let authority = dir.join(AUTHORITY);
        let certificate = dir.join(format!("{name}.crt"));
        let key_file = dir.join(format!("{name}.key"));

        let roots = Arc::new(read_roots(&authority, HINT)?);
        let revoked = read_revoked(&dir.join(REVOKED))?;
        let chain = read_certificates(&certificate, "certificate", HINT)?;
        let key = read_private_key(&key_file, HINT)?;

        let provider = Arc::new(provider());
        let who = certificate.display().to_string();
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
            .with_crls(revoked.clone())
            .only_check_end_entity_revocation()
            .build()
            .map_err(|e| bad_certificate(&who, &e))?;
        let now = UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap_or_default());
        verifier
            .verify_server_cert(&chain[0], &chain[1..], &server_name(name), &[], now)
            .map_err(|e| translate(&e, &who, &authority, at))?;

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| bad_certificate(&who, &e))?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|e| mismatch(&e, &certificate, &key_file))?;
        client.resumption = Resumption::disabled();

        let peers = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .with_crls(revoked)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|e| bad_certificate(&who, &e))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| bad_certificate(&who, &e))?
            .with_client_cert_verifier(peers)
            .with_single_cert(chain, key)
            .map_err(|e| mismatch(&e, &certificate, &key_file))?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// The lists of revoked certificates; none where there is no such file.
fn read_revoked(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let Some(text) = files::read_if_there(path, MAX_REVOKED)? else { return Ok(Vec::new()) };
    let bad = |detail: String| Error::BadFile {
        path: path.to_owned(),
        expected: "a list of revoked certificates in PEM",
        detail,
    };
    let found: Vec<_> = CertificateRevocationListDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| bad(e.to_string()))?;
    for list in &found {
        webpki::BorrowedCertRevocationList::from_der(list).map_err(|e| bad(e.to_string()))?;
    }
    // A file that is cut short must not mean that nobody was revoked.
    if found.is_empty() {
        return Err(bad("no list in it".to_owned()));
    }
    Ok(found)
}

/// The serial number of the certificate in a file, as it is written there.
pub(crate) fn serial(path: &Path) -> Result<Vec<u8>> {
    let chain = read_certificates(path, "certificate", HINT)?;
    let bad = |e: webpki::Error| bad_certificate(&path.display().to_string(), &e);
    Ok(webpki::EndEntityCert::try_from(&chain[0]).map_err(bad)?.serial().to_vec())
}

/// AES first where the processor has instructions for it (the 128-bit key: a quarter faster and
/// beyond any attack), ChaCha20 first elsewhere.
fn provider() -> CryptoProvider {
    use ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    let (small, large, plain) =
        (TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256);
    let cipher_suites =
        if has_aes() { vec![small, large, plain] } else { vec![plain, small, large] };
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

pub(crate) fn server_name(name: &HostName) -> ServerName<'static> {
    ServerName::try_from(name.as_str().to_owned())
        .expect("the rule of HostName is stricter than that of DNS names")
}

/// The one host name in a peer's verified certificate.
pub(crate) fn peer_name(certificate: &CertificateDer<'_>, who: &str) -> Result<HostName> {
    let bad = |detail: String| Error::BadCertificate { who: who.to_owned(), detail };
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|e| bad(format!("{e:?}")))?;
    let names: Vec<&str> = parsed.valid_dns_names().take(2).collect();
    let [name] = names.as_slice() else {
        return Err(bad("it must carry exactly one host name".to_owned()));
    };
    HostName::new(name)
}

/// A server's settings from a folder of PEM files.
pub(crate) fn pem_server(dir: &Path, check_clients: bool) -> Result<ServerConfig> {
    let authority = dir.join(PEM_AUTHORITY);
    let (certificate, key_file) = (dir.join("server-cert.pem"), dir.join("server-key.pem"));
    let who = certificate.display().to_string();
    let provider = Arc::new(provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| bad_certificate(&who, &e))?;
    let builder = if check_clients {
        let roots = Arc::new(read_roots(&authority, PEM_HINT)?);
        let peers = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .build()
            .map_err(|e| bad_certificate(&authority.display().to_string(), &e))?;
        builder.with_client_cert_verifier(peers)
    } else {
        builder.with_no_client_auth()
    };
    let mut server = builder
        .with_single_cert(
            read_certificates(&certificate, "certificate", PEM_HINT)?,
            read_private_key(&key_file, PEM_HINT)?,
        )
        .map_err(|e| mismatch(&e, &certificate, &key_file))?;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    server.max_early_data_size = 0;
    Ok(server)
}

/// A client's settings from a folder of PEM files; its own certificate is there or not.
pub(crate) fn pem_client(dir: &Path) -> Result<ClientConfig> {
    let authority = dir.join(PEM_AUTHORITY);
    let (certificate, key_file) = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
    let who = authority.display().to_string();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| bad_certificate(&who, &e))?
        .with_root_certificates(read_roots(&authority, PEM_HINT)?);
    let mut client = if certificate.exists() || key_file.exists() {
        builder
            .with_client_auth_cert(
                read_certificates(&certificate, "certificate", PEM_HINT)?,
                read_private_key(&key_file, PEM_HINT)?,
            )
            .map_err(|e| mismatch(&e, &certificate, &key_file))?
    } else {
        builder.with_no_client_auth()
    };
    client.resumption = Resumption::disabled();
    Ok(client)
}

fn mismatch(e: &rustls::Error, certificate: &Path, key: &Path) -> Error {
    match e {
        rustls::Error::InconsistentKeys(_) => {
            Error::KeyMismatch { certificate: certificate.to_owned(), key: key.to_owned() }
        }
        other => bad_certificate(&certificate.display().to_string(), other),
    }
}

fn read_roots(path: &Path, hint: &'static str) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for root in read_certificates(path, "authority certificate", hint)? {
        roots.add(root).map_err(|e| Error::BadFile {
            path: path.to_owned(),
            expected: "an authority's certificate",
            detail: e.to_string(),
        })?;
    }
    Ok(roots)
}

fn read_certificates(
    path: &Path,
    what: &'static str,
    hint: &'static str,
) -> Result<Vec<CertificateDer<'static>>> {
    let text = files::read(path, what, hint)?;
    let bad = |detail: String| Error::BadFile {
        path: path.to_owned(),
        expected: "a certificate in PEM",
        detail,
    };
    let found: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| bad(e.to_string()))?;
    if found.is_empty() {
        return Err(bad("no certificate in it".to_owned()));
    }
    Ok(found)
}

fn read_private_key(path: &Path, hint: &'static str) -> Result<PrivateKeyDer<'static>> {
    let text = files::read_key(path, hint)?;
    PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|e| Error::BadFile {
        path: path.to_owned(),
        expected: "a private key in PEM",
        detail: e.to_string(),
    })
}

fn bad_certificate(who: &str, e: &dyn std::fmt::Display) -> Error {
    Error::BadCertificate { who: who.to_owned(), detail: e.to_string() }
}

/// What rustls says about a certificate or a handshake, in our words.
pub(crate) fn translate(e: &rustls::Error, who: &str, authority: &Path, at: SystemTime) -> Error {
    use rustls::Error as Tls;
    let who = who.to_owned();
    match e {
        Tls::InvalidCertificate(fault) => translate_certificate(fault, who, authority, at),
        Tls::AlertReceived(alert) => Error::Refused { who, reason: alert_reason(*alert) },
        Tls::NoCertificatesPresented => Error::BadCertificate {
            who,
            detail: "it sent none; both sides must have one".to_owned(),
        },
        Tls::InvalidMessage(_) | Tls::InappropriateMessage { .. } => Error::PeerNotTls { who },
        other => Error::Tls { who, detail: other.to_string() },
    }
}

fn translate_certificate(
    fault: &CertificateError,
    who: String,
    authority: &Path,
    at: SystemTime,
) -> Error {
    let now = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let away = |t: &UnixTime| span(Duration::from_secs(t.as_secs().abs_diff(now.as_secs())));
    match fault {
        CertificateError::ExpiredContext { not_after, .. } => {
            Error::OutOfTime { who, problem: format!("expired {} ago", away(not_after)) }
        }
        CertificateError::NotValidYetContext { not_before, .. } => Error::OutOfTime {
            who,
            problem: format!("is not valid for another {}", away(not_before)),
        },
        CertificateError::Expired => Error::OutOfTime { who, problem: "has expired".to_owned() },
        CertificateError::NotValidYet => {
            Error::OutOfTime { who, problem: "is not valid yet".to_owned() }
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            Error::UnknownAuthority { who, authority: authority.to_owned() }
        }
        CertificateError::Revoked => Error::Revoked { who },
        CertificateError::UnknownRevocationStatus => {
            Error::NoRevocationList { who, authority: authority.to_owned() }
        }
        CertificateError::NotValidForNameContext { expected, presented } => Error::WrongName {
            who,
            expected: expected.to_str().into_owned(),
            presented: presented.join(", "),
        },
        other => Error::BadCertificate { who, detail: other.to_string() },
    }
}

fn alert_reason(alert: rustls::AlertDescription) -> String {
    use rustls::AlertDescription as Alert;
    match alert {
        Alert::CertificateExpired => {
            "by its clock our certificate has expired or is not valid yet".to_owned()
        }
        Alert::UnknownCA => {
            "our certificate is not from the authority that it trusts; both hosts must have the \
             same ca.crt"
                .to_owned()
        }
        Alert::CertificateRevoked => "our certificate was revoked by its authority".to_owned(),
        Alert::CertificateRequired => "it wants a certificate from us".to_owned(),
        Alert::BadCertificate | Alert::DecryptError | Alert::CertificateUnknown => {
            "it does not accept our certificate".to_owned()
        }
        Alert::ProtocolVersion => "it does not speak TLS 1.3".to_owned(),
        other => format!("TLS alert {other:?}"),
    }
}

/// A duration for people: the two largest units.
fn span(d: Duration) -> String {
    let s = d.as_secs();
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86400, s % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_show_their_two_largest_units() {
        assert_eq!(span(Duration::from_secs(59)), "59 s");
        assert_eq!(span(Duration::from_secs(61)), "1 min 1 s");
        assert_eq!(span(Duration::from_secs(2 * 86400 + 3 * 3600 + 5)), "2 d 3 h");
    }
}
