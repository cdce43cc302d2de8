//! The built-in certificate authority: a directory with `ca.crt` and `ca.key`.
//!
//! For people who have no authority of their own. Hosts need `ca.crt` and their own
//! `NAME.crt` and `NAME.key`, and `revoked.crl` once there is one; `ca.key` stays where certificates
//! are issued. `issued` and `revoked` are the authority's memory, a line for each certificate:
//!
//! ```text
//!   issued     SERIAL NAME UNTIL        serial in hexadecimal, seconds since 1970
//!   revoked    SERIAL SINCE
//! ```

use crate::{Error, HostName, Result, files, tls};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, RevocationReason, RevokedCertParams, SerialNumber,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The list of certificates that count no more, as hosts read it.
pub(crate) const REVOKED: &str = "revoked.crl";
const ISSUED_LINES: &str = "issued";
const REVOKED_LINES: &str = "revoked";

/// Ten years: the authority outlives every certificate that it issues.
const CA_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The most bytes of a list of certificates: some 100,000 of them.
const MAX_LIST: u64 = 8 << 20;

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
    /// stays valid until its time is over, or until [`Authority::revoke`].
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
        let serial = random_serial()?;
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let signed =
            params.signed_by(&key, &self.issuer).map_err(generate_failed("certificate"))?;
        // Remembered first: what nobody remembers could not be revoked.
        let mut issued = self.issued()?;
        issued.insert(hex(&serial), (name.to_string(), unix(validity.until)));
        let line = |(serial, (name, until)): (&String, &(String, u64))| {
            format!("{serial} {name} {until}\n")
        };
        let text: String = issued.iter().map(line).collect();
        files::write(&self.dir.join(ISSUED_LINES), &text, 0o600)?;
        // The key first: a certificate whose key is missing is the more confusing half.
        files::write(&self.dir.join(format!("{name}.key")), &key.serialize_pem(), 0o600)?;
        files::write(&self.dir.join(format!("{name}.crt")), &signed.pem(), 0o644)
    }

    /// Revokes every certificate that was issued for `name` so far, and writes `revoked.crl`, which is
    /// to be copied to every host beside its `ca.crt`; how many were added to it. One that is issued
    /// afterwards counts.
    ///
    /// # Errors
    /// Nothing is known to have been issued for `name`, or the files cannot be written.
    pub fn revoke(&self, name: &HostName) -> Result<usize> {
        let now = unix(SystemTime::now());
        let issued = self.issued()?;
        let of_name = issued.iter().filter(|(_, (of, _))| of == name.as_str());
        let mut serials: Vec<String> = of_name.map(|(serial, _)| serial.clone()).collect();
        // One of a time in which nobody kept a list.
        let file = self.dir.join(format!("{name}.crt"));
        if file.exists() {
            let serial = hex(&tls::serial(&file)?);
            if !serials.contains(&serial) {
                serials.push(serial);
            }
        }
        if serials.is_empty() {
            return Err(Error::NeverIssued { name: name.clone(), dir: self.dir.clone() });
        }
        let mut revoked = self.revoked()?;
        let before = revoked.len();
        for serial in serials {
            revoked.entry(serial).or_insert(now);
        }
        let added = revoked.len() - before;
        // Whose time is over needs no place in the list. One whose end is not known keeps its place.
        revoked.retain(|serial, _| issued.get(serial).is_none_or(|(_, until)| *until >= now));
        let text: String =
            revoked.iter().map(|(serial, since)| format!("{serial} {since}\n")).collect();
        files::write(&self.dir.join(REVOKED_LINES), &text, 0o600)?;
        self.write_list(&revoked, now)?;
        Ok(added)
    }

    fn write_list(&self, revoked: &BTreeMap<String, u64>, now: u64) -> Result<()> {
        let path = self.dir.join(REVOKED_LINES);
        let entry = |(serial, since): (&String, &u64)| {
            let serial = unhex(serial).ok_or_else(|| bad_line(&path, serial))?;
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from_slice(&serial),
                revocation_time: rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(*since),
                reason_code: Some(RevocationReason::Unspecified),
                invalidity_date: None,
            })
        };
        let this_update = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(now);
        let list = CertificateRevocationListParams {
            this_update,
            // Hosts do not ask for a newer one: it counts until it is replaced.
            next_update: this_update + CA_VALIDITY,
            crl_number: SerialNumber::from_slice(&now.to_be_bytes()),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect::<Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let signed = list
            .signed_by(&self.issuer)
            .map_err(generate_failed("list of revoked certificates"))?;
        let pem = signed.pem().map_err(generate_failed("list of revoked certificates"))?;
        files::write(&self.dir.join(REVOKED), &pem, 0o644)
    }

    /// Name and end of every certificate, by serial.
    fn issued(&self) -> Result<BTreeMap<String, (String, u64)>> {
        let path = self.dir.join(ISSUED_LINES);
        let entry = |line: &str| {
            let mut words = line.split(' ');
            let (serial, name, until) = (words.next()?, words.next()?, words.next()?);
            Some((serial.to_owned(), (name.to_owned(), until.parse().ok()?)))
        };
        lines(&path, entry)
    }

    /// Since when each certificate counts no more, by serial.
    fn revoked(&self) -> Result<BTreeMap<String, u64>> {
        let entry = |line: &str| {
            let (serial, since) = line.split_once(' ')?;
            Some((serial.to_owned(), since.parse().ok()?))
        };
        lines(&self.dir.join(REVOKED_LINES), entry)
    }

    /// Where the files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The entries of a file of lines; none of one that is not there.
fn lines<T>(
    path: &Path,
    entry: impl Fn(&str) -> Option<(String, T)>,
) -> Result<BTreeMap<String, T>> {
    let Some(text) = files::read_if_there(path, MAX_LIST)? else { return Ok(BTreeMap::new()) };
    text.lines().map(|line| entry(line).ok_or_else(|| bad_line(path, line))).collect()
}

fn bad_line(path: &Path, line: &str) -> Error {
    let detail = format!("\"{}\" is no line of it", line.escape_debug());
    Error::BadFile { path: path.to_owned(), expected: "a list of certificates", detail }
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// 128 random bits: positive, and never one that another key's certificate has.
fn random_serial() -> Result<[u8; 16]> {
    let mut serial = [0; 16];
    rustls::crypto::ring::default_provider().secure_random.fill(&mut serial).map_err(|_| {
        Error::Generate { what: "serial number", detail: "no random bytes".to_owned() }
    })?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(serial)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pair = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (!text.is_empty() && text.len().is_multiple_of(2))
        .then(|| (0..text.len()).step_by(2).map(pair).collect())?
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
