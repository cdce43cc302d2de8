//! Tenant keys that are at hand as bytes: from a file, from the environment, or given.

use super::{KeyError, KeyId, KeySource, seal};
use std::{fmt, io::Read, os::unix::fs::PermissionsExt, path::Path};

/// Keys in this process's memory. As text, one a line: a name, white space, 64 hexadecimal digits.
/// The first is used for what is new. Lines that begin with `#` are comments.
#[derive(Clone)]
pub struct KeyRing {
    keys: Vec<(KeyId, [u8; 32])>,
    from: String,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|(id, _)| id)).finish()
    }
}

/// A file of keys is not longer than this, in bytes.
const MAX_FILE: u64 = 1 << 20;

impl KeyRing {
    /// Keys from a file that only its owner can read.
    ///
    /// # Errors
    /// If it cannot be read, others can read it, or it holds no keys.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::File { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        file.take(MAX_FILE).read_to_string(&mut text).map_err(failed)?;
        Self::parse(&text, format!("key file {}", path.display()))
    }

    /// Keys from an environment variable; `;` may stand for the end of a line.
    ///
    /// # Errors
    /// If it is not set or holds no keys.
    pub fn from_env(variable: &str) -> Result<Self, KeyError> {
        let from = format!("environment variable {variable}");
        match std::env::var(variable) {
            Ok(text) => Self::parse(&text.replace(';', "\n"), from),
            Err(_) => Err(KeyError::None { source_of_keys: from }),
        }
    }

    /// Keys as the text of a key file, read by somebody else; `from` says where, for messages.
    ///
    /// # Errors
    /// If it holds no keys.
    pub fn from_text(text: &str, from: &str) -> Result<Self, KeyError> {
        Self::parse(text, from.to_owned())
    }

    /// Keys that are given, the one in use first.
    ///
    /// # Errors
    /// If a name is none, or there is no key.
    pub fn from_keys<'a>(
        keys: impl IntoIterator<Item = (&'a str, [u8; 32])>,
    ) -> Result<Self, KeyError> {
        let keys = keys
            .into_iter()
            .map(|(id, key)| Ok((KeyId::new(id)?, key)))
            .collect::<Result<Vec<_>, KeyError>>()?;
        let from = "the key ring".to_owned();
        if keys.is_empty() {
            return Err(KeyError::None { source_of_keys: from });
        }
        Ok(Self { keys, from })
    }

    /// A new random key as a line of a key file.
    ///
    /// # Errors
    /// If the name is none, or there are no random bytes.
    pub fn generate_line(id: &str) -> Result<String, KeyError> {
        let id = KeyId::new(id)?;
        let key: [u8; 32] = super::random()?;
        Ok(format!("{id} {}\n", blake3::Hash::from(key).to_hex()))
    }

    fn parse(text: &str, from: String) -> Result<Self, KeyError> {
        let mut keys: Vec<(KeyId, [u8; 32])> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |detail| KeyError::Syntax {
                source_of_keys: from.clone(),
                line: number + 1,
                detail,
            };
            let (id, key) = line
                .split_once(char::is_whitespace)
                .ok_or_else(|| wrong("a key is a name, a space and 64 hexadecimal digits"))?;
            let id = KeyId::new(id).map_err(|_| wrong("the name of the key is none"))?;
            let key = blake3::Hash::from_hex(key.trim())
                .map_err(|_| wrong("the key is not 64 hexadecimal digits"))?;
            if keys.iter().any(|(known, _)| *known == id) {
                return Err(wrong("a key of this name stands further up"));
            }
            keys.push((id, *key.as_bytes()));
        }
        if keys.is_empty() {
            return Err(KeyError::None { source_of_keys: from });
        }
        Ok(Self { keys, from })
    }

    fn find(&self, id: &KeyId) -> Result<[u8; 32], KeyError> {
        let key =
            self.keys.iter().find(|(known, _)| known == id).ok_or_else(|| KeyError::Lost {
                id: id.to_string(),
                needs: "a data key".to_owned(),
                source_of_keys: self.from.clone(),
                has: self
                    .keys
                    .iter()
                    .map(|(id, _)| format!("\"{id}\""))
                    .collect::<Vec<_>>()
                    .join(", "),
            })?;
        Ok(blake3::derive_key("silo-store 1 tenant key wraps data key", &key.1))
    }
}

impl KeySource for KeyRing {
    fn current(&self) -> Result<KeyId, KeyError> {
        Ok(self.keys[0].0.clone())
    }

    fn ids(&self) -> Vec<KeyId> {
        self.keys.iter().map(|(id, _)| id.clone()).collect()
    }

    fn wrap(&self, id: &KeyId, context: &[u8], secret: &[u8]) -> Result<Vec<u8>, KeyError> {
        seal::seal_small(&self.find(id)?, context, secret)
    }

    fn unwrap(&self, id: &KeyId, context: &[u8], wrapped: &[u8]) -> Result<Vec<u8>, KeyError> {
        seal::open_small(&self.find(id)?, context, wrapped).ok_or_else(|| KeyError::Wrong {
            id: id.to_string(),
            needs: "a data key".to_owned(),
            source_of_keys: self.from.clone(),
        })
    }

    fn describe(&self) -> String {
        self.from.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_key_file_that_others_can_read_is_refused_and_a_private_one_is_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"# ours\n").unwrap();
        file.write_all(KeyRing::generate_line("2026").unwrap().as_bytes()).unwrap();
        file.write_all(KeyRing::generate_line("2025").unwrap().as_bytes()).unwrap();
        let ring = KeyRing::from_file(file.path()).unwrap();
        assert_eq!(ring.current().unwrap().as_str(), "2026");
        assert_eq!(ring.ids().len(), 2);
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(KeyRing::from_file(file.path()), Err(KeyError::Exposed { .. })));
    }

    #[test]
    fn a_bad_line_is_named_by_number_and_never_shown() {
        let secret = "f".repeat(63);
        for text in [format!("a {secret}"), format!("../a {secret}f"), secret.clone()] {
            let error = KeyRing::parse(&text, "here".into()).unwrap_err();
            assert!(matches!(error, KeyError::Syntax { line: 1, .. }), "{error}");
            assert!(!error.to_string().contains("ffff"), "{error}");
        }
        let twice = format!("a {0}\na {0}", "0".repeat(64));
        assert!(matches!(
            KeyRing::parse(&twice, "h".into()),
            Err(KeyError::Syntax { line: 2, .. })
        ));
        assert!(matches!(KeyRing::parse("# x\n", "h".into()), Err(KeyError::None { .. })));
    }
}
