//! A thread that puts blocks in place, in the order in which it gets them, while their giver does
//! something else.

use super::apply::{ApplyError, Content};
use silo::device::{Device, DeviceError};
use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::JoinHandle,
};

/// Frames that wait at most; with the largest frames 4 MiB.
const QUEUE: usize = 16;

enum Work {
    Put {
        device: Arc<dyn Device>,
        content: Content,
        armed: bool,
    },
    /// Asks for a word when everything before it is done.
    Settle,
}

enum Done {
    Put(Vec<u8>),
    Settled,
    /// The first failure; nothing is put in place after it.
    Failed(DeviceError),
}

/// See the module.
pub(super) struct Helper {
    work: Option<SyncSender<Work>>,
    done: Receiver<Done>,
    spares: Vec<Vec<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    /// Starts the thread; it ends with the helper.
    pub(super) fn start() -> io::Result<Self> {
        let (work, todo) = sync_channel::<Work>(QUEUE);
        let (tell, done) = channel();
        let thread =
            std::thread::Builder::new().name("put".into()).spawn(move || run(&todo, &tell))?;
        Ok(Self { work: Some(work), done, spares: Vec::new(), thread: Some(thread) })
    }

    /// Hands blocks over. An error may be that of blocks handed over earlier.
    pub(super) fn put(
        &mut self,
        device: Arc<dyn Device>,
        content: Content,
        armed: bool,
    ) -> Result<(), ApplyError> {
        self.collect()?;
        self.give(Work::Put { device, content, armed })
    }

    /// Waits until everything that was handed over is in place.
    pub(super) fn settle(&mut self) -> Result<(), ApplyError> {
        self.give(Work::Settle)?;
        loop {
            match self.done.recv().map_err(|_| ApplyError::Helper)? {
                Done::Put(spare) => self.keep(spare),
                Done::Settled => return Ok(()),
                Done::Failed(error) => return Err(error.into()),
            }
        }
    }

    /// Memory of blocks that are in place.
    pub(super) fn spare(&mut self) -> Option<Vec<u8>> {
        self.spares.pop()
    }

    fn give(&self, work: Work) -> Result<(), ApplyError> {
        let queue = self.work.as_ref().ok_or(ApplyError::Helper)?;
        queue.send(work).map_err(|_| ApplyError::Helper)
    }

    fn collect(&mut self) -> Result<(), ApplyError> {
        while let Ok(done) = self.done.try_recv() {
            match done {
                Done::Put(spare) => self.keep(spare),
                Done::Settled => {}
                Done::Failed(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn keep(&mut self, spare: Vec<u8>) {
        if spare.capacity() > 0 {
            self.spares.push(spare);
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // What a panic had to say is on standard error.
            let _ = thread.join();
        }
    }
}

fn run(todo: &Receiver<Work>, tell: &Sender<Done>) {
    let mut broken = false;
    while let Ok(work) = todo.recv() {
        let done = match work {
            Work::Put { .. } if broken => continue,
            Work::Put { device, content, armed } => match content.put(device.as_ref(), armed) {
                Ok(spare) => Done::Put(spare),
                Err(error) => {
                    broken = true;
                    Done::Failed(error)
                }
            },
            Work::Settle => Done::Settled,
        };
        if tell.send(done).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use silo::{
        block::{BLOCK_SIZE, BlockIndex, BlockRange},
        device::DeviceName,
        memory::Memory,
    };

    fn memory(blocks: u64) -> Arc<dyn Device> {
        let name = DeviceName::new("memory").unwrap();
        Arc::new(Memory::new(name, blocks * BLOCK_SIZE as u64).unwrap())
    }

    fn block(memory: &dyn Device, at: u64) -> u8 {
        let mut block = [0; BLOCK_SIZE];
        memory.read(BlockIndex(at), &mut block).unwrap();
        assert!(block.iter().all(|byte| *byte == block[0]));
        block[0]
    }

    #[test]
    fn blocks_are_put_in_place_in_their_order_and_all_of_them_before_it_settles() {
        let memory = memory(8);
        let mut helper = Helper::start().unwrap();
        for round in 1..=100_u8 {
            let zero = Content::Zero(BlockRange::new(0, 8));
            helper.put(Arc::clone(&memory), zero, false).unwrap();
            let mut data = helper.spare().unwrap_or_default();
            data.clear();
            data.resize(4 * BLOCK_SIZE, round);
            let data = Content::Data(BlockIndex(2), data);
            helper.put(Arc::clone(&memory), data, false).unwrap();
            if round % 10 == 0 {
                helper.settle().unwrap();
                let here: Vec<u8> = (0..8).map(|at| block(memory.as_ref(), at)).collect();
                assert_eq!(here, [0, 0, round, round, round, round, 0, 0]);
            }
        }
    }

    #[test]
    fn the_first_failure_comes_back_and_nothing_is_put_in_place_after_it() {
        let memory = memory(8);
        let mut helper = Helper::start().unwrap();
        helper
            .give(Work::Put {
                device: Arc::clone(&memory),
                // Beyond what a file can have.
                content: Content::Zero(BlockRange::new(u64::MAX >> 13, 1)),
                armed: false,
            })
            .unwrap();
        helper
            .give(Work::Put {
                device: Arc::clone(&memory),
                content: Content::Data(BlockIndex(3), vec![7; BLOCK_SIZE]),
                armed: false,
            })
            .unwrap();
        let error = helper.settle().unwrap_err();
        assert!(error.to_string().contains("store"), "{error}");
        drop(helper);
        assert_eq!(block(memory.as_ref(), 3), 0);
    }
}
