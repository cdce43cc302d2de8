//! The same bytes on several devices, compared whenever they are read. A test aid: it finds out
//! which of two devices is wrong, and is no protection against a disk that fails.

use crate::io::BlockDevice;
use std::{io, sync::Arc};

/// See the comment of its module. Writers of the same place must not write at the same time: replicas
/// could then disagree about who was last.
pub struct Mirror {
    replicas: Vec<Arc<dyn BlockDevice>>,
}

impl Mirror {
    /// Over devices of the same size.
    ///
    /// # Errors
    /// If there are none, or their sizes differ.
    pub fn new(replicas: Vec<Arc<dyn BlockDevice>>) -> io::Result<Self> {
        let sizes: Vec<u64> = replicas.iter().map(|replica| replica.size()).collect();
        if sizes.is_empty() || sizes.iter().any(|size| *size != sizes[0]) {
            let text = format!("a mirror needs devices of one size, these have {sizes:?} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(Self { replicas })
    }

    fn all(&self, work: impl Fn(&dyn BlockDevice) -> io::Result<()>) -> io::Result<()> {
        self.replicas.iter().try_for_each(|replica| work(&**replica))
    }
}

impl BlockDevice for Mirror {
    fn size(&self) -> u64 {
        self.replicas[0].size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.replicas[0].read_at(offset, buf)?;
        let mut other = vec![0; buf.len()];
        for (index, replica) in self.replicas.iter().enumerate().skip(1) {
            replica.read_at(offset, &mut other)?;
            if let Some(at) = buf.iter().zip(&other).position(|(a, b)| a != b) {
                let text = format!("replicas 0 and {index} differ at byte {}", offset + at as u64);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.all(|replica| replica.write_at(offset, data))
    }

    fn flush(&self) -> io::Result<()> {
        self.all(|replica| replica.flush())
    }

    /// Zeros everywhere: a trim may leave old bytes, and then replicas would differ.
    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64, allocate: bool) -> io::Result<()> {
        self.all(|replica| replica.zero(offset, length, allocate))
    }

    fn interrupt(&self) {
        self.replicas.iter().for_each(|replica| replica.interrupt());
    }

    fn is_read_only(&self) -> bool {
        self.replicas.iter().any(|replica| replica.is_read_only())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{source::MemoryDevice, tests::random::Random};

    #[test]
    fn replicas_that_differ_are_found_out() {
        let memory = |size| Arc::new(MemoryDevice::new("test", size).unwrap());
        let (a, b) = (memory(50_000), memory(50_000));
        let mirror = Mirror::new(vec![a.clone(), b.clone()]).unwrap();
        let mut model = vec![0; 50_000];
        crate::source::tests::exercise(&mirror, &mut model, &mut Random(1), 50, "mirror");
        b.write_at(777, &[model[777] ^ 1]).unwrap();
        let error = mirror.read_at(700, &mut [0; 200]).unwrap_err();
        assert!(error.to_string().contains("byte 777"), "{error}");
        assert!(Mirror::new(vec![a, memory(1)]).is_err());
    }
}
