//! What is put over a device, without a source below it.

use super::*;

/// A device without room.
struct Full;

impl BlockDevice for Full {
    fn size(&self) -> u64 {
        4096
    }

    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn flush(&self) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.flush()
    }
}

#[test]
fn the_last_flush_does_not_wait_for_ever_for_room() {
    let config = DeviceConfig::of(SourceConfig::Memory, None);
    let policied = Arc::new(policied("full", &config, Arc::new(Full)));
    let (name, device) = ("full".to_owned(), policied.clone());
    let stack = DeviceStack { name, device, policied, recorder: None, volume: None };
    let (sender, ended) = mpsc::channel();
    // Not joined: a flush that waits for ever would take the test with it.
    thread::spawn(move || sender.send(stack.flush(Duration::from_millis(300))));
    let flushed = ended.recv_timeout(Duration::from_secs(20)).expect("it waits no longer");
    assert_eq!(flushed.unwrap_err().kind(), io::ErrorKind::StorageFull);
}
