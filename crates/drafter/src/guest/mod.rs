//! The host's end of the guest channel.
