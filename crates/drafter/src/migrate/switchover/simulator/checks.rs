//! The invariants, checked whenever time has passed and whenever something has happened.

use super::world::World;
use crate::{
    lease::BootTime,
    migrate::switchover::{DestinationAuthority, DestinationState, Token},
};

type Checked = Result<(), String>;

impl World {
    pub(super) fn check(&self) -> Checked {
        let lease = &self.store.record;
        let mut executing = self.copies.iter().enumerate().filter(|(_, copy)| copy.executes());
        let one = executing.next();
        if let (Some((a, _)), Some((b, _))) = (one, executing.next()) {
            return Err(format!("copies {a} and {b} run at the same time"));
        }
        let Some((index, copy)) = one else { return Ok(()) };
        let host = &self.hosts[copy.host];
        if copy.output && (lease.owner != host.name || lease.epoch != copy.epoch) {
            return Err(format!(
                "copy {index} on {} is heard at {}, but the lease names {} at {}",
                host.name, copy.epoch, lease.owner, lease.epoch
            ));
        }
        if let Some(until) = copy.unconfirmed_until
            && host.local(self.now) > until
        {
            return Err(format!("copy {index} runs on {} after the end of its offer", host.name));
        }
        Ok(())
    }

    /// When the offer that the move's token named ends, on the destination's clock.
    pub(super) fn token_ends(&self, m: usize) -> Option<BootTime> {
        // The source names the newest that it has; what the destination accepted is among these.
        self.moves[m].named.and_then(|serial| self.moves[m].offers.get(&serial)).copied()
    }

    pub(super) fn check_token(&mut self, m: usize, token: &Token) -> Checked {
        let mv = &mut self.moves[m];
        mv.named = Some(token.serial);
        let handed = self.store.record.handing_to.as_ref();
        let written =
            handed.is_some_and(|h| h.attempt == mv.attempt && h.to == self.hosts[mv.to].name);
        if !written || self.store.record != token.handed {
            return Err("a token is out, but the lease does not say where the machine goes".into());
        }
        if self.copies[mv.source_copy].executes() {
            return Err("a token is out while the source runs".to_owned());
        }
        Ok(())
    }

    pub(super) fn check_output(&self, m: usize) -> Checked {
        let mv = &self.moves[m];
        if mv.flush_owed && !mv.flush_durable && !mv.all_present {
            return Err("output was released before the source's flushes were durable".to_owned());
        }
        Ok(())
    }

    /// All faults are over and there was time: the owner's copy runs and is heard, unless its host
    /// crashed.
    pub(super) fn check_rest(&self) -> Checked {
        let owner = &self.store.record.owner;
        let kept =
            |copy: &&super::world::Copy| self.hosts[copy.host].name == *owner && !copy.discarded;
        let Some(copy) = self.copies.iter().rev().find(kept) else {
            return Err(format!("{owner} owns the machine and has thrown it away"));
        };
        if copy.crashed {
            return Ok(());
        }
        if !copy.executes() {
            return Err(format!("{owner} owns the machine and does not run it"));
        }
        let waits = self.moves.iter().any(|mv| {
            let state = mv.destination.as_ref().map(DestinationAuthority::state);
            mv.flush_owed
                && !mv.flush_durable
                && !mv.all_present
                && matches!(state, Some(DestinationState::Owner(_)))
        });
        if !copy.output && !waits {
            return Err(format!("the machine runs on {owner} and is never heard"));
        }
        Ok(())
    }
}
