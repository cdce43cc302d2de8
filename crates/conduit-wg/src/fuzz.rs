//! What the fuzzer drives (`fuzz/`): everything here that reads bytes from outside. A panic, or an
//! assertion that fails, is a finding.

use crate::{
    PrivateKey,
    engine::Engine,
    packet::{LARGEST, Merger, VNET, cut},
    state::{KnownPeer, PeerConfig, State},
    udp::{Outer, Wire},
};
use std::{cell::RefCell, net::SocketAddr, time::Instant};

fn room() -> Box<[u8; LARGEST]> {
    vec![0; LARGEST].into_boxed_slice().try_into().expect("it was made of that length")
}

/// A frame as if from the kernel.
pub fn fuzz_frame(bytes: &[u8]) {
    let mut frame = bytes.to_vec();
    let _ = cut(&mut frame, &mut room(), |packet| assert!(packet.len() <= LARGEST));
}

/// Packets as if from a peer: two bytes of length each. What is put together must come apart again.
pub fn fuzz_stream(mut bytes: &[u8]) {
    let (mut merger, mut packets, mut frames) = (Merger::new(true), Vec::new(), Vec::new());
    let mut write = |frame: &[u8]| frames.push(frame.to_vec());
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (packet, rest) = rest.split_at(length);
        bytes = rest;
        if packet.is_empty() {
            continue;
        }
        let mut frame = [&[0; VNET], packet].concat();
        merger.push(&mut frame, &mut write);
        packets.push(packet.to_vec());
    }
    merger.flush(&mut write);
    let mut again = Vec::new();
    for frame in &mut frames {
        let done = cut(frame, &mut room(), |packet| again.push(packet.to_vec()));
        assert!(done.is_ok(), "a frame of ours cannot be cut: {done:?}");
    }
    // Streams may pass each other.
    packets.sort();
    again.sort();
    assert!(packets == again, "{} packets became {}", packets.len(), again.len());
}

thread_local! {
    static ENGINE: RefCell<Option<Engine>> = const { RefCell::new(None) };
}

/// A datagram as if from the network, to an engine with one peer.
pub fn fuzz_datagram(bytes: &[u8]) {
    ENGINE.with_borrow_mut(|engine| {
        let engine = engine.get_or_insert_with(|| engine_with_a_peer().expect("it can be made"));
        let from = SocketAddr::from(([127, 0, 0, 1], 9));
        engine.incoming(from, bytes, Instant::now(), &mut |frame| {
            panic!("nobody has a key, but {} bytes came out", frame.len())
        });
        engine.wire.send();
    });
}

fn engine_with_a_peer() -> Result<Engine, crate::TunnelError> {
    let folder = std::env::temp_dir().join(format!("conduit-wg-fuzz-{}", std::process::id()));
    let keys = State::open(&folder)?.keys()?;
    let _ = std::fs::remove_dir_all(&folder);
    let outer = Outer::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let mut engine = Engine::new(Wire::new(outer), 1, true);
    engine.set_keys(&keys)?;
    let config = PeerConfig {
        name: "peer".into(),
        keys: vec![PrivateKey::generate()?.public()],
        allowed: vec!["10.0.0.0/8".parse()?],
        endpoint: None,
        keepalive: None,
    };
    engine.set_peers(vec![KnownPeer { config, heard_from: None }])?;
    Ok(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_targets_hold_on_what_a_fuzzer_begins_with() {
        let long = vec![4_u8; 3000];
        for bytes in [&[][..], &[0], &[4, 0, 0, 0, 1, 2, 3, 4], &long, &[1; 148], &[0x45; 64]] {
            fuzz_frame(bytes);
            fuzz_stream(bytes);
            fuzz_datagram(bytes);
        }
        let mut initiation = vec![0; 148];
        initiation[0] = 1;
        fuzz_datagram(&initiation);
    }
}
