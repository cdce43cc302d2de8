//! Every decoder of bytes from outside, for `examples/fuzz.rs` to try and `scripts/fuzz.sh` to build
//! with coverage.

/// Takes any bytes; panics where a decoder is wrong.
pub type Target = fn(&[u8]);

/// Every decoder, by the name that `FUZZ_TARGET` takes.
pub const TARGETS: &[(&str, Target)] = &[
    ("base-cache", silo::fuzz::fuzz_base_cache),
    ("binlog", silo::fuzz::fuzz_binlog),
    ("dhcp", conduit::fuzz::fuzz_dhcp),
    ("directory", silo::fuzz::fuzz_directory),
    ("journal", silo::fuzz::fuzz_journal),
    ("manifest", silo::fuzz::fuzz_manifest),
    ("maps", silo::fuzz::fuzz_maps),
    ("object-manifest", silo::fuzz::fuzz_object_manifest),
    ("sparse", silo::fuzz::fuzz_sparse),
    ("tunnel-datagram", conduit_wg::fuzz::fuzz_datagram),
    ("tunnel-frame", conduit_wg::fuzz::fuzz_frame),
    ("tunnel-stream", conduit_wg::fuzz::fuzz_stream),
    ("move-codec", silo_move::codec::fuzz_decode),
    ("move-frames", silo_move::wire::fuzz_frames),
    ("move-messages", silo_move::wire::fuzz_messages),
    ("move-preamble", silo_move::wire::fuzz_preamble),
    ("move-to-destination", silo_move::wire::fuzz_to_destination),
    ("move-to-source", silo_move::wire::fuzz_to_source),
    ("names", conduit::fuzz::fuzz_names),
    ("nbd-client", silo_expose::nbd::fuzz_nbd_client),
    ("nbd-messages", silo_expose::nbd::fuzz_nbd_messages),
    ("nbd-server", silo_expose::nbd::fuzz_nbd_server),
    ("store-entry", silo_store::fuzz_entry),
    ("store-map", silo_store::fuzz_map),
    ("store-pack", silo_store::fuzz_pack),
    ("store-pack-index", silo_store::fuzz_pack_index),
    ("store-runs", silo_store::fuzz_runs),
    ("store-pin", silo_store::fuzz_pin),
    ("store-tombs", silo_store::fuzz_tombs),
    ("vhost-chains", silo_expose::vhost::fuzz_chains),
    ("vhost-inflight", silo_expose::vhost::fuzz_inflight),
];
