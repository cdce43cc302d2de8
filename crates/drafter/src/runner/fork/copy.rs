//! A runner that begins with a copy of another machine.
//!
//! ```text
//!   image ─ own disks over its layers, memory mapped privately ─ lease ─ monitor ─ load ─ run, unheard
//!         ─ agent: names, addresses, random numbers ─ network ─ heard
//! ```
//!
//! A copy may also begin as a generation in a store, on any host (`restore`): what it has in common with
//! these is here, too.
//!
//! What must hold: the copy's lease is taken before its first instruction; frames are held by the
//! monitor until the agent has answered, and those from before carry an address that is not this
//! machine's, which the host's data path drops; a copy that comes to nothing leaves neither process nor
//! tap.

use super::{MACHINE, Runner, random_name, text};
use crate::{
    checkpoint::description::{self, Description},
    driver::{DiskKind, MachineShape, Start},
    lease::Epoch,
    migrate::{destination::DestinationMachine as _, switchover::FlipEpoch},
    package::Package,
    runner::{
        EDGE_LIMIT,
        config::{CopyOf, Forked},
        hosted::{Content, Hosted, device_name},
        take_over::Noted,
    },
};
use conduit::{MachineNet, policy::Policy};
use drafter_guest::{config::InstanceConfig, protocol::NewIdentity};
use silo::{
    disk::{Disk, DiskOptions, Layer},
    hash::RootHash,
    io::BlockDevice as _,
    memory::Memory,
    source::MemoryDevice,
};
use std::{
    fs::{self, File},
    path::Path,
    sync::Arc,
    time::Duration,
};

/// How long the agent of a copy may take, with the package's hooks.
const IDENTITY_LIMIT: Duration = Duration::from_secs(60);

impl Runner {
    /// Begins as a copy of the machine whose image `from` names.
    pub(in crate::runner) fn begin_as_copy(self: &Arc<Self>, from: &Forked) -> Result<(), String> {
        // A tap that is still being made would be there after whoever started this has tidied up. It is
        // expected under no epoch yet.
        let unmade = || self.path.unmake_tap(FlipEpoch::of(Epoch(0), u16::MAX).0);
        self.try_as_copy(from).inspect_err(|_| unmade())
    }

    fn try_as_copy(self: &Arc<Self>, from: &Forked) -> Result<(), String> {
        let gone = |error: std::io::Error| {
            format!(
                "the image of \"{}\" is gone ({}: {error}): it is kept only while the command that forks \
                 runs",
                from.identity.copy_of,
                from.memory.display()
            )
        };
        let memory = File::open(&from.memory).map_err(gone)?;
        let (saved, mut state) = read_machine(&from.folder).map_err(text)?;
        let package = self.open_package(&from.package)?;
        if package.id().to_string() != saved.package {
            return Err(format!("{} is not the machine's package", from.package.display()));
        }
        let facts = self.driver.facts().map_err(text)?;
        crate::driver::compatible(&saved.facts, &saved.shape, &facts)
            .map_err(|why| why.join("; "))?;
        if saved.shape.disk_kind == DiskKind::VhostUserBlk {
            state = self.driver.with_nbd_disks(&saved.shape, &state).map_err(text)?;
        }
        let (mut shape, net) = self.own(saved, &from.identity);
        shape.disk_kind = DiskKind::Nbd;
        // Whoever removes what is left of a copy that came to nothing finds it.
        self.lock().net.clone_from(&net);
        if let Some(net) = &net {
            self.path.make_tap(net, None);
        }
        let content = self.copied_content(memory, &package, from)?;
        let holding = self.acquire()?;
        let epoch = holding.record.epoch;
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let mut body = Hosted::build(shape, package, net, content, &site, Start::Incoming, None)
            .map_err(text)?;
        let went = body.load(&state).map_err(text);
        if let Err(why) = went.and_then(|()| self.set_going(&mut body, epoch, &from.identity)) {
            body.give_up(epoch.0);
            return Err(why);
        }
        let noted = Noted::of(&body, false);
        self.install(Box::new(body), holding, None);
        self.complete(&noted);
        Ok(())
    }

    /// What the copy is, in place of what it is a copy of.
    pub(in crate::runner) fn own(
        &self,
        saved: Description,
        identity: &CopyOf,
    ) -> (MachineShape, Option<MachineNet>) {
        let name = self.config.machine.clone();
        let mut shape = saved.shape;
        shape.name.clone_from(&name);
        shape.command_line = renamed(&shape.command_line, &name, identity);
        let net = saved.network.and_then(|net| self.own_net(net, identity));
        if let (Some(network), Some(net)) = (&mut shape.network, &net) {
            network.address = net.address;
            network.address_v6 = net.address_v6;
        }
        (shape, net)
    }

    /// The network of a copy of a machine that has the network `net`. The guest's interface keeps its MAC;
    /// each machine is alone on its tap.
    pub(in crate::runner) fn own_net(
        &self,
        net: MachineNet,
        identity: &CopyOf,
    ) -> Option<MachineNet> {
        let address = identity.address?;
        Some(MachineNet {
            machine: self.config.machine.clone(),
            address,
            address_v6: identity.address_v6,
            // Two machines cannot have the same port, or the same public address.
            ports: Vec::new(),
            policy: Policy { public: Vec::new(), ..net.policy },
            ..net
        })
    }

    fn copied_content(
        &self,
        memory: File,
        package: &Package,
        from: &Forked,
    ) -> Result<Content, String> {
        let memory = Memory::copy_of(device_name("memory").map_err(text)?, memory).map_err(text)?;
        let mut disks = Vec::new();
        for device in &package.manifest().devices {
            let dir = self.dir.disks().join(&device.name);
            let base = package.dir().join(&device.file);
            let mut options = DiskOptions::new(device_name(&device.name).map_err(text)?);
            options.base_hash = Some(RootHash::from(device.blake3.0));
            Layer::found(&from.folder, &device.name).put_below(&dir).map_err(text)?;
            let disk = Disk::create(&dir, Some(&base), device.bytes, &options).map_err(text)?;
            disks.push(Arc::new(disk));
        }
        Ok(Content { memory: Arc::new(memory), disks })
    }

    /// Runs it once its state is loaded, has its agent take its identity, and only then lets it be heard.
    pub(in crate::runner) fn set_going(
        &self,
        body: &mut Hosted,
        epoch: Epoch,
        own: &CopyOf,
    ) -> Result<(), String> {
        body.run().map_err(text)?;
        let identity = NewIdentity {
            host_name: self.config.machine.clone(),
            copy_of: own.copy_of.clone(),
            address: own.address,
            address_v6: own.address_v6,
            instance: random_name()?,
        };
        let guest = body.guest.clone().ok_or("its guest channel is not there")?;
        guest.speak_in(Duration::ZERO);
        guest.become_another(&identity, IDENTITY_LIMIT).map_err(|error| {
            format!(
                "its agent did not take the identity of a copy, so it was not let into the network: {error}"
            )
        })?;
        let flip = FlipEpoch::of(epoch, 0).0;
        body.claim_network(flip).map_err(text)?;
        body.settled(flip, EDGE_LIMIT).map_err(text)?;
        body.release().map_err(text)
    }
}

/// What the image says the machine is, and its driver's state.
fn read_machine(
    folder: &Path,
) -> Result<(Description, Vec<u8>), crate::migrate::source::MachineError> {
    let content = fs::read(folder.join(MACHINE))?;
    let device = MemoryDevice::new("machine", content.len() as u64)?;
    device.write_at(0, &content)?;
    Ok(description::decode(&device)?)
}

/// The command line that a machine of this name would have been booted with.
fn renamed(line: &str, name: &str, own: &CopyOf) -> String {
    let Ok(mut instance) = InstanceConfig::parse(line) else { return line.to_owned() };
    instance.host = Some(name.to_owned());
    instance.address = instance.address.and(own.address);
    instance.address_v6 = instance.address_v6.and(own.address_v6);
    let ours = |word: &&str| !word.starts_with("drafter.");
    let mut words: Vec<&str> = line.split_ascii_whitespace().filter(ours).collect();
    let instance = instance.to_command_line();
    words.push(&instance);
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn a_copys_command_line_names_the_copy_and_keeps_the_packages_words() {
        let own = CopyOf {
            copy_of: "redis".into(),
            address: Some(Ipv4Addr::new(10, 77, 0, 9)),
            address_v6: None,
        };
        let line = "quiet drafter.host=redis drafter.ip=10.77.0.5 drafter.gw=169.254.1.1 \
                    drafter.mtu=1380 x=1";
        assert_eq!(
            renamed(line, "redis-1", &own),
            "quiet x=1 drafter.host=redis-1 drafter.ip=10.77.0.9 drafter.gw=169.254.1.1 \
             drafter.mtu=1380"
        );
        let alone = CopyOf { address: None, ..own };
        assert_eq!(renamed("a drafter.host=redis", "redis-2", &alone), "a drafter.host=redis-2");
    }
}
