//! Keys of tenants, and the data keys that they wrap.
//!
//! Content is sealed with a *data key* that is made at random. A data key is stored wrapped by a
//! *tenant key*, which never comes near the store: it lies in a file, in the environment, or in a
//! KMS, behind [`KeySource`]. A tenant key is changed by wrapping the data keys again
//! ([`rotate`](crate::store::Store::rotate)); packs stay as they are.
//!
//! What must hold: no key is ever logged or part of an error; a key that is not there is
//! [`KeyError::Lost`], by name, before anything is written or deleted.

mod ring;
mod seal;

pub use ring::KeyRing;
pub(crate) use seal::{ObjectKey, TAG};

use crate::wire::{Malformed, Reader, put_text, put_varint};
use std::{fmt, path::PathBuf};

/// Names a tenant key: 1 to 64 characters of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(String);

impl KeyId {
    /// Takes a name.
    ///
    /// # Errors
    /// If it is none.
    pub fn new(name: &str) -> Result<Self, KeyError> {
        if crate::layout::is_name(name) {
            Ok(Self(name.to_owned()))
        } else {
            Err(KeyError::Id(name.chars().take(80).collect()))
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({})", self.0)
    }
}

/// A key that is missing or not usable.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// None of the keys at hand opens what is stored.
    #[error(
        "key \"{id}\" is lost: {needs} is sealed with it, and {source_of_keys} has only {has}; without that key the content cannot be had"
    )]
    Lost {
        /// The key.
        id: String,
        /// What needs it.
        needs: String,
        /// Where keys are taken from.
        source_of_keys: String,
        /// The ids that are there.
        has: String,
    },
    /// The key of that name does not open what was wrapped with the key of that name.
    #[error(
        "key \"{id}\" of {source_of_keys} is not the key that {needs} was sealed with, or that was changed"
    )]
    Wrong {
        /// The key.
        id: String,
        /// What needs it.
        needs: String,
        /// Where keys are taken from.
        source_of_keys: String,
    },
    /// Not a name of a key.
    #[error(
        "\"{0}\" cannot name a key: 1 to 64 characters of a-z A-Z 0-9 . _ - that do not begin with a dot"
    )]
    Id(String),
    /// There is no key at all.
    #[error(
        "{source_of_keys} holds no key; write lines of a name, a space and 64 hexadecimal digits, the key in use first"
    )]
    None {
        /// Where keys are taken from.
        source_of_keys: String,
    },
    /// A line that is no key. The line itself is not shown.
    #[error("{source_of_keys}, line {line}: {detail}")]
    Syntax {
        /// Where keys are taken from.
        source_of_keys: String,
        /// Which line, from 1.
        line: usize,
        /// What is wrong.
        detail: &'static str,
    },
    /// The file of keys cannot be read.
    #[error("could not read the keys in {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Others on this host can read the file of keys.
    #[error("{} can be read by other users (mode {mode:03o}); chmod 600 it", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The KMS said no, or nothing.
    #[error("the KMS could not {operation} with key \"{id}\": {detail}")]
    Kms {
        /// "wrap" or "unwrap".
        operation: &'static str,
        /// The key.
        id: String,
        /// The cause, in its words.
        detail: String,
    },
    /// The system gave no random bytes.
    #[error("could not make a key: {0}")]
    Random(String),
}

/// Where tenant keys are: a [`KeyRing`] from a file or the environment, or a KMS, which wraps and
/// unwraps without giving its key away.
pub trait KeySource: Send + Sync {
    /// The key that new data keys are wrapped with.
    ///
    /// # Errors
    /// If there is none.
    fn current(&self) -> Result<KeyId, KeyError>;

    /// The keys that can unwrap, as far as that is known without asking.
    fn ids(&self) -> Vec<KeyId>;

    /// Encrypts a data key. `context` must be given again to unwrap; it is not secret.
    ///
    /// # Errors
    /// If the key is not there, or the KMS fails.
    fn wrap(&self, id: &KeyId, context: &[u8], secret: &[u8]) -> Result<Vec<u8>, KeyError>;

    /// Decrypts a data key.
    ///
    /// # Errors
    /// If the key is not there or another one, or the KMS fails.
    fn unwrap(&self, id: &KeyId, context: &[u8], wrapped: &[u8]) -> Result<Vec<u8>, KeyError>;

    /// Where the keys are, for messages.
    fn describe(&self) -> String;
}

/// Names a data key: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataKeyId(pub(crate) [u8; 16]);

impl fmt::Display for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKeyId({self})")
    }
}

/// A data key: what content is sealed with, and what block names are made with. Two keys, so that
/// the first can be changed without forgetting which content is stored already.
#[derive(Clone)]
pub(crate) struct DataKey {
    pub(crate) id: DataKeyId,
    secret: [u8; 32],
    names: [u8; 32],
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DataKey({})", self.id)
    }
}

/// Random bytes.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| KeyError::Random(error.to_string()))?;
    Ok(bytes)
}

impl DataKey {
    /// A new key; block names stay what they are under `names_of`.
    pub(crate) fn generate(names_of: Option<&DataKey>) -> Result<Self, KeyError> {
        let names = match names_of {
            Some(key) => key.names,
            None => random()?,
        };
        Ok(Self { id: DataKeyId(random()?), secret: random()?, names })
    }

    #[cfg(test)]
    pub(crate) fn fixed(byte: u8) -> Self {
        Self { id: DataKeyId([byte; 16]), secret: [byte ^ 0x55; 32], names: [byte ^ 0xaa; 32] }
    }

    /// The key of one object, by the random salt in its header.
    pub(crate) fn object_key(&self, use_: &str, salt: &[u8; 16]) -> ObjectKey {
        let mut material = [0; 48];
        material[..32].copy_from_slice(&self.secret);
        material[32..].copy_from_slice(salt);
        ObjectKey::new(&blake3::derive_key(use_, &material))
    }

    /// Whether content has the same names under another key: that of the same tenant.
    pub(crate) fn names_as(&self, other: &DataKey) -> bool {
        self.names == other.names
    }

    /// The name of a block's content.
    pub(crate) fn name(&self, content: &[u8]) -> BlockName {
        let hash = blake3::keyed_hash(&self.names, content);
        let mut name = [0; BlockName::BYTES];
        name.copy_from_slice(&hash.as_bytes()[..BlockName::BYTES]);
        BlockName(name)
    }

    fn context(id: DataKeyId, by: &KeyId) -> Vec<u8> {
        let mut context = b"silo data key 1 ".to_vec();
        context.extend_from_slice(&id.0);
        context.extend_from_slice(by.as_str().as_bytes());
        context
    }

    pub(crate) fn wrap(&self, keys: &dyn KeySource, by: &KeyId) -> Result<Wrapped, KeyError> {
        let mut secret = self.secret.to_vec();
        secret.extend_from_slice(&self.names);
        let bytes = keys.wrap(by, &Self::context(self.id, by), &secret)?;
        Ok(Wrapped { id: self.id, by: by.clone(), bytes })
    }
}

/// Names a block's content within a tenant: BLAKE3 under the tenant's name key, cut to 128 bits.
/// Who does not have the key can neither tell whether two tenants hold the same block nor make
/// two blocks of one name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockName(pub(crate) [u8; Self::BYTES]);

impl BlockName {
    /// Length in bytes.
    pub const BYTES: usize = 16;

    /// The raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Debug for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A data key as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wrapped {
    pub(crate) id: DataKeyId,
    pub(crate) by: KeyId,
    bytes: Vec<u8>,
}

/// Longest wrapped key that is read: a KMS may add some hundred bytes of its own.
const MAX_WRAPPED: u64 = 4096;

impl Wrapped {
    pub(crate) fn unwrap(&self, keys: &dyn KeySource) -> Result<DataKey, KeyError> {
        let wrong = || KeyError::Wrong {
            id: self.by.to_string(),
            needs: format!("data key {}", self.id),
            source_of_keys: keys.describe(),
        };
        let secret = keys.unwrap(&self.by, &DataKey::context(self.id, &self.by), &self.bytes)?;
        let (secret, names) = secret.split_first_chunk::<32>().ok_or_else(wrong)?;
        let names: [u8; 32] = names.try_into().map_err(|_| wrong())?;
        Ok(DataKey { id: self.id, secret: *secret, names })
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.id.0);
        put_text(out, self.by.as_str());
        put_varint(out, self.bytes.len() as u64);
        out.extend_from_slice(&self.bytes);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let id = DataKeyId(reader.array()?);
        let by = KeyId::new(reader.text(64)?).map_err(|_| "a key's name is none")?;
        let length = reader.bounded(MAX_WRAPPED)? as usize;
        Ok(Self { id, by, bytes: reader.bytes(length)?.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_key_comes_back_under_its_tenant_key_and_under_no_other() {
        let ring = KeyRing::from_keys([("one", [1; 32]), ("two", [2; 32])]).unwrap();
        let key = DataKey::fixed(7);
        let one = KeyId::new("one").unwrap();
        let wrapped = key.wrap(&ring, &one).unwrap();
        let mut bytes = Vec::new();
        wrapped.encode(&mut bytes);
        let mut reader = Reader::new(&bytes);
        let read = Wrapped::decode(&mut reader).unwrap();
        reader.end().unwrap();
        assert_eq!(read, wrapped);
        assert_eq!(read.unwrap(&ring).unwrap().secret, key.secret);

        let impostor = KeyRing::from_keys([("one", [9; 32])]).unwrap();
        assert!(matches!(read.unwrap(&impostor), Err(KeyError::Wrong { .. })));
        let without = KeyRing::from_keys([("two", [2; 32])]).unwrap();
        let error = read.unwrap(&without).unwrap_err();
        assert!(matches!(error, KeyError::Lost { .. }));
        assert!(error.to_string().contains("key \"one\" is lost"), "{error}");
    }

    #[test]
    fn names_differ_between_tenants_and_stay_when_the_data_key_changes() {
        let (a, b) = (DataKey::generate(None).unwrap(), DataKey::generate(None).unwrap());
        assert_ne!(a.name(b"content"), b.name(b"content"));
        let next = DataKey::generate(Some(&a)).unwrap();
        assert_eq!(a.name(b"content"), next.name(b"content"));
        assert_ne!(a.secret, next.secret);
    }
}
