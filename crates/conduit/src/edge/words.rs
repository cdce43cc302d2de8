//! What agents say about machines, and what comes of it: a claim, a release, a candidate. Each word is
//! judged ([`super::authority`]), then by the rules of epochs ([`super::ledger`]), written down, and made
//! in the kernel. Called by the listeners, a thread per agent.

use super::{
    Candidate, Core, Expected, Shared,
    authority::{Refusal, Word},
    ledger::{Change, Entry},
};
use crate::{
    datapath::{MachineKey, MachineNet, NetError, NetworkId},
    exec::KernelError,
    homes::Home,
    wire,
};
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{MutexGuard, PoisonError},
    time::Instant,
};

impl Shared {
    /// Routes lead IPv4 of one network.
    fn check_path(&self, net: &MachineNet) -> Result<(), NetError> {
        let simple = net.network == NetworkId::COMMON && net.address_v6.is_none();
        if simple || self.plane.is_some() {
            return Ok(());
        }
        let detail = "routes know neither tenants' networks nor IPv6; start all hosts and edges with \
                      --path bpf";
        Err(NetError::failed(net, "take it to the edge", detail))
    }

    /// `host` may have a machine next, `by` says: the host itself, or the machine's owner.
    pub(super) fn candidate(
        &self,
        by: Ipv4Addr,
        net: &MachineNet,
        host: Ipv4Addr,
        long: bool,
    ) -> Result<(), NetError> {
        wire::check_machine(net)?;
        let mut core = self.core();
        let entry = core.ledger.get(net.key()).cloned();
        let Some(entry) = entry.filter(|e| !e.released) else {
            return if by == host { self.expect(&mut core, by, net) } else { Ok(()) };
        };
        let concerned = by == host || by == entry.owner;
        if entry.net.machine != net.machine || entry.owner == host || !concerned {
            return Ok(());
        }
        if by == host {
            core.candidates.insert(net.key(), Candidate { by, long });
        }
        // What a host says of itself is no offence; it just may not be believed.
        if self.authority.may_announce(&entry, core.name(by), core.name(host)) {
            core.believed.insert(net.key(), host);
        }
        if self.plane.is_none() {
            return Ok(());
        }
        self.lead(&mut core, &entry)
            .map_err(|e| NetError::failed(net, "announce where it may go", e))
    }

    /// Nobody has this machine, and `by` says that it will: what comes meanwhile is held.
    fn expect(&self, core: &mut Core, by: Ipv4Addr, net: &MachineNet) -> Result<(), NetError> {
        let Some(plane) = self.plane.as_ref().filter(|plane| plane.holds()) else { return Ok(()) };
        core.ledger.check_rules(net)?;
        let epoch = core.ledger.get(net.key()).map_or(0, |e| e.epoch);
        plane
            .expect(net, epoch, self.authority.believes_strangers().then_some(by))
            .map_err(|e| NetError::failed(net, "hold its frames at the edge", e))?;
        let expected = Expected { net: net.clone(), by, since: Instant::now() };
        core.expected.insert(net.key(), expected);
        Ok(())
    }

    /// A host that said it might have a machine will not; false if it had not said so.
    fn withdraw(&self, core: &mut Core, by: Ipv4Addr, net: &MachineNet) -> Result<bool, NetError> {
        let fail = |e: KernelError| NetError::failed(net, "forget where it might have gone", e);
        if core.expected.get(&net.key()).is_some_and(|e| e.by == by) {
            self.expect_no_more(core, net.key()).map_err(fail)?;
            return Ok(true);
        }
        if core.candidates.get(&net.key()).is_some_and(|c| c.by == by) {
            core.candidates.remove(&net.key());
            core.believed.remove(&net.key());
            let entry = core.ledger.get(net.key()).filter(|e| !e.released).cloned();
            if let Some(entry) = entry {
                self.lead(core, &entry).map_err(fail)?;
            }
            return Ok(true);
        }
        Ok(false)
    }

    pub(super) fn expect_no_more(
        &self,
        core: &mut Core,
        key: MachineKey,
    ) -> Result<(), KernelError> {
        let Some(expected) = core.expected.remove(&key) else { return Ok(()) };
        let taken = core.ledger.get(key).is_some_and(|e| !e.released);
        match &self.plane {
            Some(plane) if !taken => plane.forget(&expected.net),
            _ => Ok(()),
        }
    }

    pub(super) fn claim(
        &self,
        by: Ipv4Addr,
        net: &MachineNet,
        owner: Ipv4Addr,
        epoch: u64,
        home: Option<Home>,
    ) -> Result<(Change, Option<Home>), Refusal> {
        let done = self.try_claim(by, net, (owner, epoch), home);
        self.count_refusal(done)
    }

    fn try_claim(
        &self,
        by: Ipv4Addr,
        net: &MachineNet,
        (owner, epoch): (Ipv4Addr, u64),
        home: Option<Home>,
    ) -> Result<(Change, Option<Home>), Refusal> {
        self.check_path(net)?;
        let (mut core, holder) = self.authorise(by, net, owner, epoch)?;
        let core = &mut *core;
        if !core.hosts.contains_key(&owner) {
            let detail = format!("no host with overlay address {owner} has ever connected");
            return Err(NetError::failed(net, "take it to the edge", detail).into());
        }
        let before = core.ledger.get(net.key()).cloned();
        if before.as_ref().is_none_or(|b| b.released) {
            self.check_given(core, net)?;
        }
        let mut change = core.ledger.claim(by, net, owner, epoch)?;
        let home = core.ledger.at_home(net.key(), home);
        // With another home it has other public addresses.
        change.ports |= before.as_ref().is_some_and(|b| !b.released && b.home != home);
        if by == owner {
            core.awaited.remove(&net.key());
        } else if change.route
            && core.candidates.get(&net.key()).is_some_and(|c| c.by == owner && c.long)
        {
            core.awaited.insert(net.key(), Instant::now());
        }
        core.ledger.held_by(net.key(), holder);
        self.commit(core, net, before, change)?;
        Ok((change, home))
    }

    /// The home of a machine, if this edge knows it.
    pub(super) fn home_of(&self, net: &MachineNet) -> Option<Home> {
        let core = self.core();
        let entry = core.ledger.get(net.key()).filter(|e| !e.released)?;
        entry.home.filter(|_| entry.net.machine == net.machine)
    }

    /// After a claim and its answer: what nobody waits for.
    pub(super) fn claimed(&self, net: &MachineNet, owner: Ipv4Addr, epoch: u64) {
        self.machines.wake();
        tracing::info!(machine = net.machine, address = %net.key(), %owner, epoch, "way set");
    }

    pub(super) fn release(
        &self,
        by: Ipv4Addr,
        net: &MachineNet,
        epoch: u64,
    ) -> Result<(), Refusal> {
        let done = self.try_release(by, net, epoch);
        self.count_refusal(done)
    }

    fn try_release(&self, by: Ipv4Addr, net: &MachineNet, epoch: u64) -> Result<(), Refusal> {
        let mut core = self.core();
        let owner = core.ledger.get(net.key()).filter(|e| !e.released).map(|e| e.owner);
        if owner != Some(by) && self.withdraw(&mut core, by, net)? {
            return Ok(());
        }
        drop(core);
        if owner.is_none() {
            return Ok(());
        }
        let (mut core, _) = self.authorise(by, net, by, epoch)?;
        let core = &mut *core;
        let before = core.ledger.get(net.key()).cloned();
        let change = core.ledger.release(by, net, epoch)?;
        self.commit(core, net, before, change)?;
        if change.route {
            self.return_address(core, net.key(), &net.machine);
        }
        tracing::info!(machine = net.machine, address = %net.key(), epoch, "machine released");
        Ok(())
    }

    /// Asks whether `by` may say that `owner` has the machine, without holding anybody up: a lease is
    /// read from a disk, perhaps another computer's. Returns the core as it was judged, and whose lease
    /// the epoch is of.
    fn authorise(
        &self,
        by: Ipv4Addr,
        net: &MachineNet,
        owner: Ipv4Addr,
        epoch: u64,
    ) -> Result<(MutexGuard<'_, Core>, Option<String>), Refusal> {
        let mut core = self.core();
        // Each turn that ends in vain is another host's word about the same machine.
        for _ in 0..16 {
            let known = core.ledger.get(net.key()).cloned();
            // The second to say what is known changes nothing, unless it is the owner's own word.
            let said =
                known.as_ref().is_some_and(|k| !k.released && k.epoch == epoch && k.owner == owner);
            if said && by != owner {
                return Ok((core, None));
            }
            let (speaker, named) = (core.name(by).to_owned(), core.name(owner).to_owned());
            drop(core);
            let word = Word { by: &speaker, owner: &named, epoch };
            let holder = self.authority.judge(known.as_ref(), net, word)?;
            core = self.core();
            if core.ledger.get(net.key()) == known.as_ref() {
                return Ok((core, holder));
            }
        }
        let busy = "others speak of it all the time";
        Err(Refusal::Later(NetError::failed(net, "judge a word about it", busy)))
    }

    fn count_refusal<T>(&self, done: Result<T, Refusal>) -> Result<T, Refusal> {
        if let Err(Refusal::Final(error) | Refusal::Later(error)) = &done {
            let name = match error {
                NetError::StaleEpoch { .. } => "flip_stale_epoch",
                NetError::EpochTaken { .. } => "flip_epoch_taken",
                NetError::Unauthorised { .. } => "flip_unauthorised",
                NetError::Failed { .. } => "flip_failed",
            };
            tracing::warn!(%error, "a word about a machine had no effect");
            *self.refused().entry(name).or_default() += 1;
        }
        done
    }

    pub(super) fn refused(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the kernel follow the ledger: the route first, because a move waits for it. Asked
    /// again with nothing new, the route is made again all the same.
    fn commit(
        &self,
        core: &mut Core,
        net: &MachineNet,
        before: Option<Entry>,
        change: Change,
    ) -> Result<(), NetError> {
        let fail = |e: KernelError| NetError::failed(net, "set its way at the edge", e);
        let Some(entry) = core.ledger.get(net.key()).cloned() else { return Ok(()) };
        // A move: its entry in the kernel says it, and the file may follow.
        let known = before
            .as_ref()
            .is_some_and(|b| !b.released && b.net == entry.net && b.home == entry.home);
        let entry_says_it = self.plane.is_some() && known && !entry.released;
        if before.as_ref() != Some(&entry) {
            if entry_says_it {
                self.machines.note(net.key(), entry.clone());
            } else if let Err(error) = self.machines.save(net.key(), &entry) {
                core.ledger.undo(net.key(), before);
                return Err(fail(error));
            }
        }
        if entry.released {
            self.mislead(core, net).map_err(fail)?;
        } else {
            core.expected.remove(&net.key());
            if before.as_ref().is_none_or(|b| b.owner != entry.owner) {
                core.candidates.remove(&net.key());
                core.believed.remove(&net.key());
            }
            self.lead(core, &entry).map_err(fail)?;
        }
        if change.ports {
            let before = before.as_ref().filter(|b| !b.released).map(Into::into);
            let after = (!entry.released).then(|| (&entry).into());
            self.nat.change(before, after).map_err(fail)?;
        }
        Ok(())
    }
}
