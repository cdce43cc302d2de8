//! Addresses and names of machines, as hosts ask this edge for them: what [`super::pool`] chooses is
//! written down and then said, and questions for names are answered from the ledger.

use super::{
    Core, Shared,
    names::{Machines, Verdict},
    pool::{GIVEN_VERSION, Given, Has, State},
};
use crate::{
    datapath::{MachineKey, MachineNet, NetError, NetworkId},
    exec::KernelError,
    wire,
};
use hickory_proto::op::ResponseCode;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::PoisonError,
    time::{SystemTime, UNIX_EPOCH},
};

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The ledger, locked for each look into it: a flip waits for no message to be read or made.
impl Machines for Shared {
    fn by_name(&self, network: NetworkId, name: &str) -> Option<(Ipv4Addr, Option<Ipv6Addr>)> {
        let core = self.core();
        let entry = core.ledger.named(network, name).next()?;
        Some((entry.net.address, entry.net.address_v6))
    }

    fn by_address(&self, network: NetworkId, address: IpAddr) -> Option<String> {
        let core = self.core();
        let entry = match address {
            IpAddr::V4(address) => core.ledger.get(MachineKey { network, address }),
            IpAddr::V6(address) => core.ledger.at_v6(network, address),
        };
        entry.filter(|e| !e.released).map(|e| e.net.machine.clone())
    }

    fn is_inside(&self, address: IpAddr) -> bool {
        self.core().ledger.is_inside(address)
    }
}

impl Shared {
    /// What was given before this start. Whose release was the last thing that the last edge wrote has
    /// returned it.
    pub(super) fn take_up_addresses(&self, core: &mut Core) -> Result<(), KernelError> {
        for given in self.addresses.load::<Given>()? {
            if given.version > GIVEN_VERSION {
                return Err(KernelError::new(
                    format!("read who has the address {}", given.key()),
                    format!("it is of version {}, written by a newer edge", given.version),
                ));
            }
            let gone = |e: &super::Entry| e.released && e.net.machine == given.machine;
            let (key, machine) = (given.key(), given.machine.clone());
            let gone = core.ledger.get(key).is_some_and(gone);
            core.pool.put(given);
            if gone {
                self.return_address(core, key, &machine);
            }
        }
        let count = core.pool.given().filter(|g| matches!(g.state, State::Given { .. })).count();
        if count > 0 {
            tracing::info!(count, "addresses were given to machines before");
        }
        Ok(())
    }

    /// The addresses of a machine that comes without any. They are on the disk before they are said.
    pub(super) fn give_address(
        &self,
        machine: &str,
        network: NetworkId,
    ) -> Result<(Ipv4Addr, Option<Ipv6Addr>), NetError> {
        let fail = |detail: String| NetError::failed_for(machine, "give it an address", detail);
        wire::check_name(machine).map_err(fail)?;
        if network.0 == 0 {
            return Err(fail("network 0 is nobody's; networks are 1 to 65535".into()));
        }
        // One after the other, and while the disk is waited for, nobody waits for the ledger.
        let _one_at_a_time = self.giving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut core = self.core();
        let mut same = core.ledger.named(network, machine).filter(|e| e.net.machine == machine);
        let has = same.next().map(|e| Has { address: e.net.address, address_v6: e.net.address_v6 });
        drop(same);
        let taken =
            |address, v6| core.ledger.is_taken(MachineKey { network, address }, v6, machine);
        let given = core.pool.choose(machine, network, now(), has, taken);
        let given = given.map_err(|e| fail(e.to_string()))?;
        let key = given.key();
        let addresses = (given.address, given.address_v6);
        let before = core.pool.get(key).cloned();
        if before.as_ref() == Some(&given) {
            return Ok(addresses);
        }
        core.pool.put(given.clone());
        drop(core);
        if let Err(error) = self.addresses.save_for_good(key, &given) {
            self.core().pool.undo(key, before);
            return Err(fail(error.to_string()));
        }
        tracing::info!(machine, address = %key, v6 = ?given.address_v6, "address given");
        Ok(addresses)
    }

    /// A machine's address may be given to others after a while, if it came from here.
    pub(super) fn return_address(&self, core: &mut Core, key: MachineKey, machine: &str) {
        let Some(returned) = core.pool.returned(key, machine, now()) else { return };
        // Not done again: the next start sees by the ledger that the machine is gone.
        if let Err(error) = self.addresses.save(key, &returned) {
            tracing::warn!(machine, %error, "its address comes back after the next start only");
        }
        core.pool.put(returned);
    }

    /// An address that was given to one machine is not taken by another that chose it.
    pub(super) fn check_given(&self, core: &Core, net: &MachineNet) -> Result<(), NetError> {
        let Some(other) = core.pool.other_owner(net.key(), &net.machine, now()) else {
            return Ok(());
        };
        let detail = format!(
            "{} was given to machine \"{other}\", which comes soon; choose another, or let this edge",
            net.key()
        );
        Err(NetError::failed(net, "take it to the edge", detail))
    }

    /// Answers a question for a name, perhaps later and from another thread.
    pub(super) fn resolve(
        &self,
        question: Vec<u8>,
        network: NetworkId,
        stream: bool,
        answer: impl FnOnce(Vec<u8>) + Send + 'static,
    ) {
        let verdict = self.zone.judge(&question, network, stream, self);
        match verdict {
            Verdict::Answer(bytes) if bytes.len() <= super::forward::LONGEST => answer(bytes),
            Verdict::Answer(_) => {
                if let Some(failure) = super::names::failure(&question, ResponseCode::ServFail) {
                    answer(failure);
                }
            }
            Verdict::Forward { datagram } => {
                self.forwarder.ask(question, stream, datagram, answer);
            }
            Verdict::Nothing => {}
        }
    }
}
