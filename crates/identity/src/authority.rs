//! The built-in certificate authority: a directory with `ca.crt` and `ca.key`.
//!
//! For people who have no authority of their own. Hosts need `ca.crt` and their own
//! `NAME.crt` and `NAME.key`; `ca.key` stays where certificates are issued.

use crate::{Error, HostName, Result, files};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Ten years: the authority outlives every certificate that it issues.
const CA_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Certificates start this long before they are issued, because the clocks of two hosts differ.
const BACKDATE: Duration = Duration::from_secs(3600);

/// When a certificate may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First moment.
    pub from: SystemTime,
    /// Last moment.
    pub until: SystemTime,
}

impl Validity {
    /// From now (an hour earlier, for hosts whose clock is behind) for `length`.
    #[must_use]
    pub fn from_now(length: Duration) -> Self {
        let now = SystemTime::now();
        Self { from: now - BACKDATE, until: now + length }
    }
}

/// A certificate authority whose files are at hand.
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a new authority in `dir` (made if needed, mode 0700): `ca.crt`, `ca.key` (0600).
    ///
    /// # Errors
    /// [`Error::Exists`] if there is one already: replacing it would lock every host out.
    pub fn create(dir: &Path) -> Result<Self> {
        files::make_dir(dir)?;
        let (certificate, key_file) = (dir.join("ca.crt"), dir.join("ca.key"));
        for path in [&certificate, &key_file] {
            if path.exists() {
                return Err(Error::Exists { path: path.clone() });
            }
        }
        let key = generate_key()?;
        let params = ca_params(&key);
        let signed = params.self_signed(&key).map_err(generate_failed("certificate"))?;
        files::write(&key_file, &key.serialize_pem(), 0o600)?;
        files::write(&certificate, &signed.pem(), 0o644)?;
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// Opens the authority that [`Authority::create`] made in `dir`.
    ///
    /// # Errors
    /// Says which file is missing or wrong.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("ca.key");
        let text =
            files::read_key(&path, "make an authority first, or go to the host that has it")?;
        let key = KeyPair::from_pem(&text).map_err(|e| Error::BadFile {
            path,
            expected: "a private key in PEM",
            detail: e.to_string(),
        })?;
        let params = ca_params(&key);
        Ok(Self { dir: dir.to_owned(), issuer: Issuer::new(params, key) })
    }

    /// Issues `NAME.crt` and `NAME.key` (0600) in the authority's directory, valid from an hour ago
    /// for `length`. A second issue for the same name replaces the files; the first certificate
    /// stays valid until its time is over, because nothing here revokes.
    ///
    /// # Errors
    /// The name is none, or the files cannot be written.
    pub fn issue(&self, name: &HostName, length: Duration) -> Result<()> {
        self.issue_for(name, Validity::from_now(length))
    }

    /// As [`Authority::issue`], for a given time.
    ///
    /// # Errors
    /// As [`Authority::issue`].
    pub fn issue_for(&self, name: &HostName, validity: Validity) -> Result<()> {
        let key = generate_key()?;
        let mut params = CertificateParams::new(vec![name.to_string()])
            .map_err(generate_failed("certificate"))?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name.as_str());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, validity);
        let signed =
            params.signed_by(&key, &self.issuer).map_err(generate_failed("certificate"))?;
        // The key first: a certificate whose key is missing is the more confusing half.
        files::write(&self.dir.join(format!("{name}.key")), &key.serialize_pem(), 0o600)?;
        files::write(&self.dir.join(format!("{name}.crt")), &signed.pem(), 0o644)
    }

    /// Where the files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn generate_failed(what: &'static str) -> impl FnOnce(rcgen::Error) -> Error {
    move |e| Error::Generate { what, detail: e.to_string() }
}

fn generate_key() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(generate_failed("key"))
}

/// The authority's own certificate is a function of its key (but for its times), so that opening it
/// needs no parser. Its name carries part of the key: two authorities never have the same name,
/// and a certificate of the wrong one is reported as such instead of as a bad signature.
fn ca_params(key: &KeyPair) -> CertificateParams {
    let public = key.public_key_raw();
    let tail = &public[public.len().saturating_sub(8)..];
    let id: String = tail.iter().map(|b| format!("{b:02x}")).collect();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("architect authority {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, Validity::from_now(CA_VALIDITY));
    params
}

fn set_validity(params: &mut CertificateParams, validity: Validity) {
    // Before 1970 is clamped to 1970.
    let since = |t: SystemTime| t.duration_since(UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(since(validity.from).as_secs());
    params.not_after = epoch + Duration::from_secs(since(validity.until).as_secs());
}
