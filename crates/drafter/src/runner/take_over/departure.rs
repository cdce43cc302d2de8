//! A machine that was paused by a move whose runner died: this one serves its frozen content, until
//! the destination needs it no more or the lease says that the machine goes on here.

use super::{MoveNote, Noted, text};
use crate::{
    driver::{Vm, qemu},
    lease::{BootClock, Clock, Epoch, Record},
    migrate::{
        source::{self, Kept, MachineError, Place, Recovered},
        switchover::{FlipEpoch, Holding, SourceAuthority, Terms},
    },
    package::Package,
    runner::{
        Runner, State,
        hosted::{Found, Hosted},
        moves::Job,
    },
    tenure::random_nonces,
};
use conduit::DataPath as _;
use identity::HostName;
use std::{sync::Arc, time::Duration};

const GONE: &str = "its monitor is gone, and with it the memory that the destination may need; if the lease is this \
     host's, start it from its disks (--keep-disks)";

impl Runner {
    /// True if the machine stands still and is looked after; false if it runs.
    pub(super) fn take_over_departure(
        self: &Arc<Self>,
        noted: &Noted,
        by: &MoveNote,
        package: &Package,
        lease: &Record,
    ) -> Result<bool, String> {
        let disks = self.open_disks(package, false)?;
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let net = noted.network.as_ref();
        // Without servers for its disks: what stands still asks for nothing.
        let found = Found::look(&noted.shape, net, disks, noted.arrived, &site, |_| Ok(()))
            .map_err(text)?;
        // Whether a protected one stands still for the move or for the end of its lease is all the same:
        // it is not asked before its lease says that it may run.
        let vm = match lease.beat {
            Some(_) => None,
            None => Some(self.driver.take_over(site.run_dir).map_err(text)?.ok_or(GONE)?),
        };
        if vm.as_ref().is_some_and(|vm| vm.is_running()) {
            if lease.owner != self.host {
                return Err(format!(
                    "host \"{}\" owns it ({}), but it runs here: `drafter stop` it",
                    lease.owner, lease.epoch
                ));
            }
            found.content.memory.detach();
            return Ok(false);
        }
        let place = self.place_of(by)?;
        if let (Some(_), Some(config)) = (&lease.beat, &self.config.protect) {
            // Its destination knows by it that what it lacks is still here.
            self.tenure(config.pace())?;
        }
        let hold = Duration::from_millis(by.offers_hold_ms);
        let mut terms = Terms::default();
        if !hold.is_zero() {
            terms.longest_offer = hold.min(terms.longest_offer);
        }
        // What it wants done at once is what this does anyway: serve pages.
        let (authority, _) = SourceAuthority::recover(
            BootClock.now(),
            &self.host,
            lease.clone(),
            terms,
            random_nonces(),
        );
        let job = self.new_job();
        self.lock().devices = found.content.devices();
        self.set_state(State::Moving, format!("to {}, taken over", by.peer));
        let flips = by.flips;
        let (runner, noted, package) = (Arc::clone(self), noted.clone(), package.clone());
        let kept = std::thread::Builder::new().name("departure".into()).spawn(move || {
            let result = runner
                .see_departure_through(place, authority, found, vm, &noted, package, flips, &job);
            job.finish(result);
        });
        kept.map(|_| true).map_err(|error| format!("no thread to serve its content: {error}"))
    }

    fn place_of(&self, by: &MoveNote) -> Result<Place, String> {
        Ok(Place {
            machine: self.config.machine.clone(),
            host: self.config.host.clone(),
            attempt: by.attempt,
            session: by.session().ok_or("the note of its move names no session")?,
            to: by.to.ok_or("the note of its move does not say where it went")?,
            peer: HostName::new(&by.peer).map_err(text)?,
            security: self.config.security.load(&self.host).map_err(text)?,
            round_trip: Duration::ZERO,
            resumes: true,
        })
    }

    #[expect(clippy::too_many_arguments, reason = "what a thread was given")]
    fn see_departure_through(
        self: &Arc<Self>,
        place: Place,
        authority: SourceAuthority,
        found: Found,
        vm: Option<Box<dyn Vm>>,
        noted: &Noted,
        package: Package,
        flips: u16,
        job: &Job,
    ) -> Result<serde_json::Value, String> {
        let peer = place.peer.as_str().to_owned();
        let mut flush = || {
            for disk in &found.content.disks {
                disk.sync().map_err(|e| -> MachineError { e.to_string().into() })?;
            }
            Ok(())
        };
        let kept = source::keep(Recovered {
            place,
            authority,
            store: Arc::clone(&self.store),
            devices: found.content.devices(),
            flush: &mut flush,
            cancel: job.cancel_flag(),
            outage: &|outage| self.note_outage(outage),
            // Its generations ended with the runner before this one.
            history: None,
        });
        match kept {
            Kept::Released { epoch } => {
                let ended = match vm {
                    Some(mut vm) => vm.kill(),
                    None => qemu::stop_without_runner(&self.dir.run()).map(drop),
                };
                if let Err(error) = ended {
                    tracing::error!(%error, "ending the monitor failed");
                }
                // Its disks may be made anew by the next arrival.
                drop(found);
                super::forget(&self.dir);
                self.forget_network(noted.network.as_ref(), epoch);
                {
                    let mut inner = self.lock();
                    inner.devices.clear();
                    inner.holding = None;
                }
                let state =
                    if self.config.listen.is_some() { State::Standby } else { State::Stopped };
                self.set_state(state, format!("moved to {peer}"));
                Ok(serde_json::json!({ "moved_to": peer, "epoch": epoch }))
            }
            Kept::GoOn { mut holding, .. } => {
                // Those before the move, and the one of its pause, which gave the machine away.
                holding.flips = holding.flips.saturating_add(flips).saturating_add(1);
                let flip = FlipEpoch::of(holding.record.epoch, holding.flips);
                let back = self.bring_back(found, vm, noted, package, holding, flip);
                match back {
                    Ok(()) => Err("the move failed; the machine is running here again".into()),
                    Err(why) => {
                        self.set_state(State::Failed, why.clone());
                        Err(why)
                    }
                }
            }
            Kept::Paused(error) => {
                let text = error.to_string();
                self.set_state(State::Paused, text.clone());
                Err(text)
            }
        }
    }

    fn bring_back(
        self: &Arc<Self>,
        found: Found,
        vm: Option<Box<dyn Vm>>,
        noted: &Noted,
        package: Package,
        mut holding: Holding,
        mut flip: FlipEpoch,
    ) -> Result<(), String> {
        let paths = self.site();
        let site = paths.site(&*self.driver, &self.path);
        let vm = match vm {
            Some(vm) => vm,
            None => {
                match self.regain(&holding.record)? {
                    Some(regained) => holding = regained,
                    None => return Err("another host has taken the machine".into()),
                }
                flip = FlipEpoch::of(holding.record.epoch, 0);
                self.driver.take_over(site.run_dir).map_err(text)?.ok_or(GONE)?
            }
        };
        let servers = found.serve(&noted.shape, &site).map_err(text)?;
        let (net, shape) = (noted.network.clone(), noted.shape.clone());
        let mut body: Hosted = found.adopt(package, net, shape, servers, vm, &site);
        self.output_as_before(&mut body)?;
        self.lead_here(&mut body, flip)?;
        body.release().map_err(text)?;
        self.install(Box::new(body), holding, None);
        super::note_leaving(&self.dir, None);
        Ok(())
    }

    fn forget_network(&self, net: Option<&conduit::MachineNet>, epoch: u64) {
        let Some(net) = net else { return };
        let last = FlipEpoch::of(Epoch(epoch.saturating_sub(1)), u16::MAX);
        if let Err(error) = self.path.forget(net, last.0) {
            tracing::warn!(%error, "the network still knows the machine here");
        }
    }
}
