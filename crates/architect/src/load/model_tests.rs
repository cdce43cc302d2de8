//! A model server that can lie in every way the model claims to notice.

use super::*;
use crate::load::resp::Decoder;
use std::collections::HashMap;

/// Redis, as far as the load uses it.
#[derive(Default, Clone)]
struct Server(HashMap<Vec<u8>, Vec<u8>>);

impl Server {
    fn execute(&mut self, command: &[Vec<u8>]) -> Reply {
        let content = self.0.entry(command[1].clone()).or_default();
        match command[0].as_slice() {
            b"DEL" => {
                content.clear();
                Reply::Integer(1)
            }
            b"INCR" => {
                let value: i64 = String::from_utf8_lossy(content).parse().unwrap_or(0) + 1;
                *content = value.to_string().into_bytes();
                Reply::Integer(value)
            }
            b"SET" => {
                content.clone_from(&command[2]);
                Reply::Status("OK".into())
            }
            b"APPEND" => {
                content.extend_from_slice(&command[2]);
                Reply::Integer(content.len() as i64)
            }
            b"GET" if content.is_empty() => Reply::Nil,
            b"GET" => Reply::Bulk(content.clone()),
            other => panic!("unknown command {other:?}"),
        }
    }
}

/// The bulk strings of one encoded command.
fn parse(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let end = bytes.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    bytes = &bytes[end..];
    let mut decoder = Decoder::default();
    decoder.extend(bytes);
    std::iter::from_fn(|| decoder.next_reply().unwrap())
        .map(|reply| match reply {
            Reply::Bulk(part) => part,
            other => panic!("{other:?}"),
        })
        .collect()
}

fn perform(model: &mut Model, server: &mut Server, index: usize, operation: Operation) {
    let mut out = Vec::new();
    model.send(index, operation, &mut out);
    let reply = server.execute(&parse(&out));
    model.answer(index, &reply).unwrap();
}

fn rounds(model: &mut Model, server: &mut Server, rounds: usize) {
    for _ in 0..rounds {
        for index in 0..model.len() {
            let operation = model.choose(index);
            perform(model, server, index, operation);
        }
    }
}

fn read_all(model: &mut Model, server: &mut Server) -> (u64, u64, u64) {
    for index in 0..model.len() {
        perform(model, server, index, Operation::Read);
    }
    let Findings { lost, doubled, wrong, .. } = model.findings;
    (lost, doubled, wrong)
}

fn loaded() -> (Model, Server) {
    let mut model = Model::new("t:", 9, 100, 1);
    let mut server = Server::default();
    rounds(&mut model, &mut server, 300);
    (model, server)
}

fn content<'a>(server: &'a mut Server, key: &str) -> &'a mut Vec<u8> {
    server.0.get_mut(key.as_bytes()).unwrap()
}

#[test]
fn an_honest_server_is_found_honest() {
    let (mut model, mut server) = loaded();
    assert_eq!(read_all(&mut model, &mut server), (0, 0, 0), "{:?}", model.findings);
    assert_eq!(model.findings.reads + model.findings.writes, 9 * 301);
    assert!(model.findings.writes > model.findings.reads);
}

#[test]
fn a_lost_increment_is_counted_once() {
    let (mut model, mut server) = loaded();
    let value: i64 = String::from_utf8_lossy(content(&mut server, "t:counter:0")).parse().unwrap();
    *content(&mut server, "t:counter:0") = (value - 2).to_string().into_bytes();
    perform(&mut model, &mut server, 0, Operation::Increment);
    assert_eq!(read_all(&mut model, &mut server), (2, 0, 0));
}

#[test]
fn a_doubled_increment_is_counted() {
    let (mut model, mut server) = loaded();
    server.execute(&[b"INCR".to_vec(), b"t:counter:3".to_vec()]);
    assert_eq!(read_all(&mut model, &mut server), (0, 1, 0));
}

#[test]
fn an_older_value_that_came_back_is_a_lost_write() {
    let (mut model, mut server) = loaded();
    let old = content(&mut server, "t:value:1").clone();
    perform(&mut model, &mut server, 1, Operation::Write(100_000));
    *content(&mut server, "t:value:1") = old;
    assert_eq!(read_all(&mut model, &mut server), (1, 0, 0));
}

#[test]
fn one_flipped_bit_or_another_keys_value_is_a_wrong_answer() {
    let (mut model, mut server) = loaded();
    content(&mut server, "t:value:1")[90] ^= 1;
    let other = content(&mut server, "t:value:4").clone();
    *content(&mut server, "t:value:7") = other;
    assert_eq!(read_all(&mut model, &mut server), (0, 0, 2));
}

#[test]
fn lost_doubled_and_garbled_records_of_a_log_are_told_apart() {
    let (mut model, mut server) = loaded();
    for index in [2, 5, 8] {
        perform(&mut model, &mut server, index, Operation::Empty);
        for _ in 0..6 {
            perform(&mut model, &mut server, index, Operation::Append);
        }
    }
    content(&mut server, "t:log:2").truncate(4 * RECORD);
    let last = content(&mut server, "t:log:5")[5 * RECORD..].to_vec();
    content(&mut server, "t:log:5").extend(last);
    content(&mut server, "t:log:8")[RECORD + 20] ^= 1;
    // The garbled record of the third log is also missing.
    assert_eq!(read_all(&mut model, &mut server), (3, 1, 1));
    rounds(&mut model, &mut server, 50);
    assert_eq!(read_all(&mut model, &mut server), (3, 1, 1), "faults are counted once");
}

#[test]
fn a_log_that_is_too_short_or_too_long_is_noticed_by_the_next_append() {
    let (mut model, mut server) = loaded();
    for index in [2, 5] {
        perform(&mut model, &mut server, index, Operation::Empty);
        perform(&mut model, &mut server, index, Operation::Append);
    }
    content(&mut server, "t:log:2").clear();
    let twice = content(&mut server, "t:log:5").repeat(2);
    *content(&mut server, "t:log:5") = twice;
    for index in [2, 5] {
        perform(&mut model, &mut server, index, Operation::Append);
    }
    let Findings { lost, doubled, wrong, .. } = model.findings;
    assert_eq!((lost, doubled, wrong), (1, 1, 0), "{:?}", model.findings);
}

#[test]
fn a_server_that_forgot_everything_lost_every_acknowledged_write() {
    let (mut model, _) = loaded();
    let (lost, doubled, wrong) = read_all(&mut model, &mut Server::default());
    assert!(lost > 3 * 200, "three counters of hundreds of increments alone, found {lost}");
    assert_eq!((doubled, wrong), (0, 0));
}

#[test]
fn what_was_in_flight_when_the_connection_broke_may_have_happened_or_not() {
    for happened in [false, true] {
        let (mut model, mut server) = loaded();
        perform(&mut model, &mut server, 8, Operation::Empty);
        let operations =
            [Operation::Increment, Operation::Write(90_000), Operation::Append].repeat(2);
        let operations = operations.into_iter().chain([
            Operation::Increment,
            Operation::Write(1_000_000),
            Operation::Empty,
        ]);
        for (index, operation) in operations.enumerate() {
            let mut out = Vec::new();
            model.send(index, operation, &mut out);
            if happened {
                server.execute(&parse(&out));
            }
        }
        model.broken();
        assert_eq!(read_all(&mut model, &mut server), (0, 0, 0), "{:?}", model.findings);
        rounds(&mut model, &mut server, 50);
        assert_eq!(read_all(&mut model, &mut server), (0, 0, 0), "{:?}", model.findings);
    }
}

#[test]
fn what_was_in_flight_twice_is_doubled() {
    let (mut model, mut server) = loaded();
    let mut out = Vec::new();
    model.send(0, Operation::Increment, &mut out);
    model.broken();
    server.execute(&parse(&out));
    server.execute(&parse(&out));
    assert_eq!(read_all(&mut model, &mut server), (0, 1, 0));
}

#[test]
fn a_reply_of_another_command_means_out_of_step_and_a_refusal_is_none() {
    let mut model = Model::new("t:", 3, 100, 1);
    model.send(0, Operation::Increment, &mut Vec::new());
    assert!(model.answer(0, &Reply::Status("OK".into())).is_err());
    model.send(1, Operation::Write(1), &mut Vec::new());
    assert!(model.answer(1, &Reply::Error("OOM".into())).unwrap());
    assert_eq!(model.findings.refused, 1);
    perform(&mut model, &mut Server::default(), 1, Operation::Read);
    assert_eq!(model.findings.lost, 0, "a refused write was not acknowledged");
}

#[test]
fn absurd_numbers_from_the_server_do_not_panic() {
    for absurd in [i64::MIN, -1, i64::MAX] {
        let (mut model, mut server) = loaded();
        for (index, operation) in [(0, Operation::Increment), (2, Operation::Append)] {
            for _ in 0..2 {
                model.send(index, operation, &mut Vec::new());
                model.answer(index, &Reply::Integer(absurd)).unwrap();
            }
        }
        *content(&mut server, "t:counter:3") = absurd.to_string().into_bytes();
        let (lost, doubled, _) = read_all(&mut model, &mut server);
        assert!(lost + doubled > 0);
    }
}

#[test]
fn values_and_records_look_as_they_always_did() {
    assert_eq!(String::from_utf8(value("k", 7, 20)).unwrap(), "k|7|d2d746c6c1d33d74");
    assert_eq!(sequence_of("k", &value("k", 7, 200), 200), Some(7));
    assert_eq!(String::from_utf8_lossy(&record("k", 255)), "00000000000000ffddd245a97938306\n");
}
