//! TLS to stores: rustls with ring, a server's name always verified.

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The files that an address names. They are read when the store is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Files {
    /// Authorities to believe; without it, those of this system.
    pub(crate) authority: Option<PathBuf>,
    /// Who we are: a chain and its key.
    pub(crate) own: Option<(PathBuf, PathBuf)>,
}

fn chain_of(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let chain: Vec<_> =
        read.map_err(|e| format!("read certificates of {}: {e}", path.display()))?;
    if chain.is_empty() {
        return Err(format!("read certificates of {}: there are none", path.display()));
    }
    Ok(chain)
}

/// What a client needs. The error says what could not be done.
pub(crate) fn client(files: &Files) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = &files.authority {
        for certificate in chain_of(path)? {
            roots.add(certificate).map_err(|e| format!("take {}: {e}", path.display()))?;
        }
    } else {
        let system = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(system.certs);
        if roots.is_empty() {
            return Err("find this system's certificate authorities: install ca-certificates, or \
                        name a file of the authority's certificate in the address"
                .to_owned());
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("choose versions of TLS: {e}"))?
        .with_root_certificates(roots);
    let Some((certificates, key)) = &files.own else {
        return Ok(builder.with_no_client_auth());
    };
    let secret = PrivateKeyDer::from_pem_file(key)
        .map_err(|e| format!("read the key of {}: {e}", key.display()))?;
    builder
        .with_client_auth_cert(chain_of(certificates)?, secret)
        .map_err(|e| format!("use {} with {}: {e}", certificates.display(), key.display()))
}

/// Whether TLS itself refused: trying again would not help.
pub(crate) fn refused(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        let inner = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let found = match inner {
            Some(inner) => inner.downcast_ref::<rustls::Error>(),
            None => cause.downcast_ref::<rustls::Error>(),
        };
        // Other errors of TLS are those of a line that breaks.
        if let Some(rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_)) = found
        {
            return true;
        }
        // An io::Error's own source skips what it holds.
        next = match inner {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => cause.source(),
        };
    }
    false
}
