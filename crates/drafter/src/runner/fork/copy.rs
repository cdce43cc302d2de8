//! A runner that begins with a copy of another machine.
//!
//! ```text
//!   image ─ own disks over its layers, memory mapped privately ─ lease ─ monitor ─ load ─ run, unheard
//!         ─ agent: names, addresses, random numbers ─ network ─ heard
//! ```
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
        config::Forked,
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
        let gone = |error: std::io::Error| {
            format!(
                "the image of \"{}\" is gone ({}: {error}): it is kept only while the command that forks \
                 runs",
                from.copy_of,
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
        let (shape, net) = self.own(saved, from);
        // Whoever removes what is left of a copy that came to nothing finds it.
        self.lock().net.clone_from(&net);
        let content = self.copied_content(memory, &package, from)?;
        let holding = self.acquire()?;
        let epoch = holding.record.epoch;
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let mut body = Hosted::build(shape, package, net, content, &site, Start::Incoming, None)
            .map_err(text)?;
        if let Err(why) = self.set_going(&mut body, &state, epoch, from) {
            body.give_up(epoch.0);
            return Err(why);
        }
        let noted = Noted::of(&body, false);
        self.install(Box::new(body), holding, None);
        self.complete(&noted);
        Ok(())
    }

    /// What the copy is, in place of what it is a copy of.
    fn own(&self, saved: Description, from: &Forked) -> (MachineShape, Option<MachineNet>) {
        let name = self.config.machine.clone();
        let mut shape = saved.shape;
        shape.name.clone_from(&name);
        shape.disk_kind = DiskKind::Nbd;
        shape.command_line = renamed(&shape.command_line, &name, from);
        // The guest's interface keeps its MAC; each machine is alone on its tap.
        let net = saved.network.zip(from.address).map(|(net, address)| MachineNet {
            machine: name,
            address,
            address_v6: from.address_v6,
            // Two machines cannot have the same port, or the same public address.
            ports: Vec::new(),
            policy: Policy { public: Vec::new(), ..net.policy },
            ..net
        });
        if let (Some(network), Some(net)) = (&mut shape.network, &net) {
            network.address = net.address;
            network.address_v6 = net.address_v6;
        }
        (shape, net)
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

    /// Runs it, has its agent take its identity, and only then lets it be heard.
    fn set_going(
        &self,
        body: &mut Hosted,
        state: &[u8],
        epoch: Epoch,
        from: &Forked,
    ) -> Result<(), String> {
        body.load(state).map_err(text)?;
        body.run().map_err(text)?;
        let identity = NewIdentity {
            host_name: self.config.machine.clone(),
            copy_of: from.copy_of.clone(),
            address: from.address,
            address_v6: from.address_v6,
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
fn renamed(line: &str, name: &str, from: &Forked) -> String {
    let Ok(mut instance) = InstanceConfig::parse(line) else { return line.to_owned() };
    instance.host = Some(name.to_owned());
    instance.address = instance.address.and(from.address);
    instance.address_v6 = instance.address_v6.and(from.address_v6);
    let ours = |word: &&str| !word.starts_with("drafter.");
    let mut words: Vec<&str> = line.split_ascii_whitespace().filter(ours).collect();
    let own = instance.to_command_line();
    words.push(&own);
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Accelerator, HostFacts};
    use std::net::Ipv4Addr;

    #[test]
    fn a_copys_command_line_names_the_copy_and_keeps_the_packages_words() {
        let from = Forked {
            copy_of: "redis".into(),
            folder: "/f".into(),
            memory: "/m".into(),
            package: "/p".into(),
            facts: HostFacts {
                driver: "qemu 7.2.22".into(),
                accelerator: Accelerator::Tcg,
                tsc_khz: 1,
                cpu_features: vec![],
            },
            address: Some(Ipv4Addr::new(10, 77, 0, 9)),
            address_v6: None,
        };
        let line = "quiet drafter.host=redis drafter.ip=10.77.0.5 drafter.gw=169.254.1.1 \
                    drafter.mtu=1380 x=1";
        assert_eq!(
            renamed(line, "redis-1", &from),
            "quiet x=1 drafter.host=redis-1 drafter.ip=10.77.0.9 drafter.gw=169.254.1.1 \
             drafter.mtu=1380"
        );
        let alone = Forked { address: None, ..from };
        assert_eq!(renamed("a drafter.host=redis", "redis-2", &alone), "a drafter.host=redis-2");
    }
}
