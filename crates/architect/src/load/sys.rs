//! `TCP_INFO`: what the kernel knows about a connection. The layout is Linux's `struct tcp_info`
//! (include/uapi/linux/tcp.h), which only ever grows at its end, so fields are read by offset from
//! as many bytes as this kernel filled in.

use std::{io, net::TcpStream, os::fd::AsRawFd};

const RETRANSMITS: usize = 2;
const RTT_MICROSECONDS: usize = 68;
const TOTAL_RETRANSMITS: usize = 100;
const BYTES_ACKNOWLEDGED: usize = 120;
const BYTES_RETRANSMITTED: usize = 208;
const TOTAL_RTO: usize = 240;

/// What the client's end of one connection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TcpInfo {
    /// Unanswered retransmissions of the oldest segment right now.
    pub(super) retransmits_now: u8,
    /// Smoothed round-trip time in microseconds.
    pub(super) rtt_us: u32,
    /// Segments sent again over the connection's life.
    pub(super) total_retransmits: u32,
    /// Bytes that the other end has; 0 before Linux 4.1.
    pub(super) bytes_acknowledged: u64,
    /// Bytes sent again; `None` before Linux 4.19.
    pub(super) bytes_retransmitted: Option<u64>,
    /// How often the retransmission timer fired; `None` before Linux 6.7.
    pub(super) total_rto: Option<u16>,
}

/// Asks the kernel about `stream`.
pub(super) fn tcp_info(stream: &TcpStream) -> io::Result<TcpInfo> {
    let mut bytes = [0u8; 512];
    let mut length = bytes.len() as libc::socklen_t;
    // SAFETY: `bytes` is writable for `length` bytes and both outlive the call; the kernel writes
    // at most `length` bytes and stores how many it wrote.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            bytes.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(parse(&bytes[..(length as usize).min(bytes.len())]))
}

fn parse(bytes: &[u8]) -> TcpInfo {
    fn at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
        bytes.get(offset..offset + N)?.try_into().ok()
    }
    TcpInfo {
        retransmits_now: at::<1>(bytes, RETRANSMITS).map_or(0, |[count]| count),
        rtt_us: at(bytes, RTT_MICROSECONDS).map_or(0, u32::from_ne_bytes),
        total_retransmits: at(bytes, TOTAL_RETRANSMITS).map_or(0, u32::from_ne_bytes),
        bytes_acknowledged: at(bytes, BYTES_ACKNOWLEDGED).map_or(0, u64::from_ne_bytes),
        bytes_retransmitted: at(bytes, BYTES_RETRANSMITTED).map(u64::from_ne_bytes),
        total_rto: at(bytes, TOTAL_RTO).map(u16::from_ne_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{Read, Write},
        mem::offset_of,
        net::TcpListener,
    };

    #[test]
    fn offsets_are_those_of_the_c_library_where_it_knows_the_field() {
        assert_eq!(RETRANSMITS, offset_of!(libc::tcp_info, tcpi_retransmits));
        assert_eq!(RTT_MICROSECONDS, offset_of!(libc::tcp_info, tcpi_rtt));
        assert_eq!(TOTAL_RETRANSMITS, offset_of!(libc::tcp_info, tcpi_total_retrans));
    }

    #[test]
    fn a_connection_that_carried_data_has_a_round_trip_time_and_no_retransmits() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        client.write_all(b"ping").unwrap();
        server.read_exact(&mut [0; 4]).unwrap();
        server.write_all(b"pong").unwrap();
        client.read_exact(&mut [0; 4]).unwrap();
        let info = tcp_info(&client).unwrap();
        assert!(info.rtt_us > 0, "{info:?}");
        assert_eq!(info.total_retransmits, 0);
    }

    #[test]
    fn an_older_kernels_shorter_answer_leaves_newer_fields_unknown() {
        let info = parse(&[7u8; 104]);
        assert_eq!(info.total_retransmits, 0x0707_0707);
        assert_eq!((info.bytes_retransmitted, info.total_rto), (None, None));
    }
}
