//! After the last fault everything comes to rest: from every state one run without any more faults, in
//! which what can happen does, is followed to its end.

use super::{Size, steps::Step, world::World};
use std::collections::HashSet;

/// More steps than any such run takes.
const LONGEST: usize = 300;

/// States from which everything comes to rest.
#[derive(Default)]
pub(super) struct Rested(std::sync::Mutex<HashSet<u64>>);

impl Size {
    /// The next state of the run without faults; none at its end.
    fn calm_step(&self, world: &World, digest: u64) -> Option<(Step, World, u64)> {
        let mut steps = Vec::new();
        world.steps(&mut steps);
        steps.into_iter().find_map(|step| {
            let next = world.after(step, self.clocks);
            let then = next.digest();
            (then != digest).then_some((step, next, then))
        })
    }

    /// The error is where it ends, with the way that leads there.
    pub(super) fn rests(&self, world: &World, rested: &Rested) -> Result<(), String> {
        let mut way = Vec::new();
        let mut told = Vec::new();
        let (mut at, mut digest) = (world.clone(), world.digest());
        loop {
            if at.wrong.is_some() || rested.0.lock().unwrap().contains(&digest) {
                break;
            }
            way.push(digest);
            if way.len() > LONGEST {
                return Err(format!("it does not come to rest\n{}", told.join("\n")));
            }
            let Some((step, next, then)) = self.calm_step(&at, digest) else {
                at.at_rest().map_err(|why| format!("{why}\n{}", told.join("\n")))?;
                break;
            };
            told.push(at.tell(step));
            (at, digest) = (next, then);
        }
        rested.0.lock().unwrap().extend(way);
        Ok(())
    }
}
