//! The other end of the connection that the machine begins: sends back what comes.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

const TICK: Duration = Duration::from_millis(100);

/// A running server. Dropping it ends its threads.
pub(super) struct Echo {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    over: AtomicBool,
    connections: AtomicU64,
}

impl Echo {
    /// Serves `listener`, whichever namespace it was opened in.
    pub(super) fn start(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("echo".into())
            .spawn(move || accept(&listener, &for_thread))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Connections accepted so far.
    pub(super) fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut serving = Vec::new();
    while !shared.over.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, peer)) => {
                shared.connections.fetch_add(1, Ordering::Relaxed);
                let shared = Arc::clone(shared);
                let work = move || serve(stream, peer, &shared);
                match thread::Builder::new().name("echo-one".into()).spawn(work) {
                    Ok(thread) => serving.push(thread),
                    Err(error) => tracing::warn!(%error, "no thread for a connection"),
                }
            }
            Err(_) => thread::sleep(TICK / 10),
        }
    }
    for thread in serving {
        let _ = thread.join();
    }
}

fn serve(mut stream: TcpStream, peer: SocketAddr, shared: &Shared) {
    let result = (|| {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        let mut buffer = vec![0; 16 * 1024];
        while !shared.over.load(Ordering::Relaxed) {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => stream.write_all(&buffer[..read])?,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    })();
    if let Err(error) = result {
        tracing::debug!(%peer, %error, "an echoed connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_comes_back_and_dropping_the_server_ends_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let echo = Echo::start(listener).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(b"number one").unwrap();
        let mut back = [0; 10];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"number one");
        assert_eq!(echo.connections(), 1);
        drop(echo);
        assert_eq!(stream.read(&mut back).unwrap(), 0);
        TcpStream::connect(address).unwrap_err();
    }
}
