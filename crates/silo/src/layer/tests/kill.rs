//! A real process that writes to a stack and is killed in the middle.
//!
//! The child is this test binary again, with an environment variable that says where to write. It
//! tells over its output which writes were answered, and which were flushed.

use super::*;
use std::{
    env,
    io::{BufRead, BufReader, Write as _},
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::AtomicBool,
    time::Duration,
};

const PLACE: &str = "SILO_TEST_KILL_STACK";
const BLOCKS: u64 = 64;

fn page(number: u64) -> Vec<u8> {
    number.to_le_bytes().iter().copied().cycle().take(4096).collect()
}

/// Not a test of its own: what the child does when it is told where.
#[test]
fn child_of_the_kill_test() {
    let Some(dir) = env::var_os(PLACE).map(PathBuf::from) else { return };
    let stack = Stack::open(&dir, None).unwrap();
    let mut random = Random(u64::from(std::process::id()));
    let mut out = std::io::stdout();
    for number in 1u64.. {
        let block = random.below(BLOCKS);
        // Said before it is done: an unanswered write may be there or not.
        writeln!(out, "\nwill {block} {number}").unwrap();
        stack.write_at(block * 4096, &page(number)).unwrap();
        writeln!(out, "\ndid {block} {number}").unwrap();
        match random.below(20) {
            0 => stack.flush().unwrap(),
            1 => drop(stack.push(Duration::from_secs(10)).unwrap()),
            2 => {
                stack.merge(&AtomicBool::new(false)).unwrap();
            }
            _ => {}
        }
    }
}

#[test]
fn check_24_a_process_that_is_killed_loses_no_answered_write() {
    for round in 0..6u64 {
        let dir = tempfile::tempdir().unwrap();
        let options = StackOptions { bytes: BLOCKS * 4096, block: 4096 };
        drop(Stack::create(dir.path(), None, options).unwrap());
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["layer::tests::kill::child_of_the_kill_test", "--exact", "--nocapture"])
            .env(PLACE, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut answered, mut last) = (vec![0; BLOCKS as usize], (0, 0));
        let mut writes = 0;
        let mut take = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let [verb, block, number] = words[..] else { return };
            let (Ok(block), Ok(number)) = (block.parse::<u64>(), number.parse::<u64>()) else {
                return;
            };
            match verb {
                "will" => last = (block, number),
                "did" => {
                    answered[block as usize] = number;
                    writes += 1;
                }
                _ => {}
            }
        };
        let enough = 200 + round as usize * 137;
        for line in lines.by_ref().take(enough) {
            take(&line.unwrap());
        }
        child.kill().unwrap();
        // What it had said before it died.
        lines.map_while(Result::ok).for_each(|line| take(&line));
        assert!(!child.wait().unwrap().success());
        assert!(writes > 20, "{writes}");

        let stack = Stack::open(dir.path(), None).unwrap();
        let content = content_of(&stack);
        for (block, number) in answered.iter().enumerate() {
            let found = &content[block * 4096..][..4096];
            let allowed =
                found == page(*number) || (last.0 == block as u64 && found == page(last.1));
            assert!(allowed, "round {round}, block {block}: write {number} was answered");
        }
    }
}
