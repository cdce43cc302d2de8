//! How a machine moves.
//!
//! ```text
//!   source                                                destination
//!   ------                                                -----------
//!   Prepare ───────────────────────────────────────────▶  checks, builds everything
//!           ◀───────────────────────────────── Verdict    paused machine, faults, disks, tap
//!           ◀────────────────────────────────── Offer …   renewed while it holds
//!   Names, RoundEnd ───────────────────────────────────▶  if it has something to compare: [`names`]
//!           ◀───────────────── Missing lists, RoundApplied
//!   Blocks, Zero, RoundEnd ────────────────────────────▶  stored
//!           ◀──────────────────────────── RoundApplied    (rounds repeat)
//!   lease: handing-to(n)
//!   a last short round, or Missing lists, RoundEnd ────▶  stored, or dropped
//!   pause ─ frames flip to the destination
//!   ┌ Missing lists, hot Blocks, Token(n, k, state) ───▶  arm, load, run, take the lease
//!   │ one flight                                          frames leave when the lease is won
//!   └ SourceDurable ───────────────────────────────────▶  and the source's flushes are durable
//!           ◀────────────────────────────── Confirmed
//!   Blocks … BulkEnd ──────────────────────────────────▶  filled
//!           ◀══ Demand ══  ══ Blocks ══▶                  faults, on their own connection
//!           ◀──────────────────────────────── Durable     the source may go
//! ```
//!
//! If a connection breaks after the token, the source opens new ones ([`again`]):
//!
//! ```text
//!   Resume(attempt, session) ──────────────────────────▶  is it the source of this move?
//!           ◀─────────────── Resumed, Missing lists, RoundEnd(nonce)
//!   RoundApplied(nonce) ───────────────────────────────▶  old connections are dropped
//!   SourceDurable, Blocks … BulkEnd ───────────────────▶  and faults, as before
//! ```
//!
//! A host may have one place where sources ask for a runner first: [`reception`].
//!
//! [`protocol`] is the wire, [`messages`] its JSON payloads, [`planner`] decides when to switch
//! over, [`switchover`] decides who may run, [`source`] and [`destination`] do the work over a
//! [`link`] and a machine behind a trait, [`timings`] is what they report.

pub mod again;
pub mod destination;
pub mod link;
pub mod lists;
pub mod messages;
pub mod names;
pub mod planner;
pub mod protocol;
pub mod reception;
pub mod source;
pub mod switchover;
pub mod timings;

#[cfg(test)]
mod resume_tests;
