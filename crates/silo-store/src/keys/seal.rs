//! AES-256-GCM by `ring`, with nonces that count.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

/// Bytes that sealing adds.
pub(crate) const TAG: usize = 16;

/// The key of one object. Each object has its own, made from 128 random bits, so that counting
/// from 0 in every object never uses a nonce twice under one key.
pub(crate) struct ObjectKey(LessSafeKey);

impl ObjectKey {
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        let unbound = UnboundKey::new(&AES_256_GCM, key).expect("32 bytes are a key of AES-256");
        Self(LessSafeKey::new(unbound))
    }

    fn nonce(counter: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&counter.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    /// Seals `buf[from..]` in place and appends the tag.
    pub(crate) fn seal(&self, counter: u64, bound_to: &[u8], buf: &mut Vec<u8>, from: usize) {
        let tag = self
            .0
            .seal_in_place_separate_tag(Self::nonce(counter), Aad::from(bound_to), &mut buf[from..])
            .expect("shorter than AES-GCM's limit of 64 GiB");
        buf.extend_from_slice(tag.as_ref());
    }

    /// Opens in place; `None` if the bytes are not what was sealed.
    pub(crate) fn open<'a>(
        &self,
        counter: u64,
        bound_to: &[u8],
        sealed: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        self.0.open_in_place(Self::nonce(counter), Aad::from(bound_to), sealed).ok()
    }
}

/// Seals a small secret under a key that is used again and again: a random nonce goes in front.
pub(super) fn seal_small(
    key: &[u8; 32],
    context: &[u8],
    secret: &[u8],
) -> Result<Vec<u8>, super::KeyError> {
    let nonce: [u8; 12] = super::random()?;
    let mut out = secret.to_vec();
    ObjectKey::new(key)
        .0
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut out)
        .expect("a key is short");
    out.splice(0..0, nonce);
    Ok(out)
}

pub(super) fn open_small(key: &[u8; 32], context: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let (nonce, rest) = sealed.split_first_chunk::<12>()?;
    let mut rest = rest.to_vec();
    let nonce = Nonce::assume_unique_for_key(*nonce);
    let length =
        ObjectKey::new(key).0.open_in_place(nonce, Aad::from(context), &mut rest).ok()?.len();
    rest.truncate(length);
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_only_at_its_place_and_unchanged() {
        let key = ObjectKey::new(&[3; 32]);
        let mut buf = b"clear secret".to_vec();
        key.seal(5, b"header", &mut buf, 6);
        assert_eq!(&buf[..6], b"clear ");
        assert_eq!(buf.len(), 12 + TAG);
        assert_eq!(key.open(5, b"header", &mut buf.clone()[6..]).unwrap(), b"secret");
        assert!(key.open(4, b"header", &mut buf.clone()[6..]).is_none());
        assert!(key.open(5, b"leader", &mut buf.clone()[6..]).is_none());
        let mut changed = buf.clone();
        changed[8] ^= 1;
        assert!(key.open(5, b"header", &mut changed[6..]).is_none());
        assert!(key.open(5, b"header", &mut []).is_none());
    }
}
