//! Whether a recorded history of one cell is linearizable: exact and fast, because no two writes write
//! the same content, so that their order is known.

use std::collections::HashMap;

/// Content by number; 0 is the empty cell.
pub(crate) type Value = u64;

/// One call, with the time of its beginning and of its answer (`None`: it got no answer).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) begun: u64,
    pub(crate) answered: Option<u64>,
    pub(crate) did: Did,
}

/// What a call did, as far as its caller knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Did {
    /// A read, or a swap that found another content: the cell held this.
    Saw(Value),
    /// A swap that won; or whose answer got lost.
    Wrote { expected: Value, new: Value },
}

/// The error says which call cannot be placed.
///
/// Every content has one write, and the writes are a chain. Each is placed as early as it can be: not
/// before it began, nor before the write that it follows, nor before the beginning of any call that saw
/// the content that it replaced. It must then be placed before its own answer, and before the answer of
/// every call that saw what it wrote. If the earliest places do not do, no others do.
pub(crate) fn check(history: &[Entry]) -> Result<usize, String> {
    let seen: HashMap<Value, Vec<&Entry>> = history.iter().fold(HashMap::new(), |mut map, e| {
        if let Did::Saw(value) = e.did {
            map.entry(value).or_insert_with(Vec::new).push(e);
        }
        map
    });
    let mut writes: HashMap<Value, Vec<(Value, &Entry)>> = HashMap::new();
    for entry in history {
        if let Did::Wrote { expected, new } = entry.did {
            writes.entry(expected).or_default().push((new, entry));
        }
    }
    let sure = |new: Value, entry: &Entry| {
        entry.answered.is_some() || seen.contains_key(&new) || writes.contains_key(&new)
    };
    let (mut value, mut place, mut length) = (0, 0, 0);
    loop {
        let readers = seen.get(&value).map_or(&[][..], Vec::as_slice);
        if let Some(late) = readers.iter().find(|e| e.answered.is_some_and(|end| end < place)) {
            return Err(format!("content {value} was seen before it was there: {late:?}"));
        }
        let mut next = writes.get(&value).into_iter().flatten().filter(|(new, e)| sure(*new, e));
        let Some((new, write)) = next.next() else { break };
        if let Some((other, _)) = next.next() {
            return Err(format!("content {value} was replaced twice: by {new} and by {other}"));
        }
        let last_seen = readers.iter().map(|e| e.begun).max().unwrap_or(0);
        place = place.max(write.begun).max(last_seen);
        if write.answered.is_some_and(|end| end < place) {
            return Err(format!("content {value} was seen after it was replaced by {new}"));
        }
        (value, length) = (*new, length + 1);
    }
    let won = history
        .iter()
        .filter(|e| e.answered.is_some() && matches!(e.did, Did::Wrote { .. }))
        .count();
    if won > length {
        return Err(format!("{won} writes won, and only {length} are one after the other"));
    }
    Ok(length)
}

#[test]
fn histories_are_told_apart() {
    let saw = |begun, end, value| Entry { begun, answered: Some(end), did: Did::Saw(value) };
    let wrote = |begun, end, expected, new| Entry {
        begun,
        answered: end,
        did: Did::Wrote { expected, new },
    };
    let good = [
        wrote(0, Some(9), 0, 1),
        saw(1, 3, 0),
        saw(4, 8, 1),
        wrote(10, None, 1, 2),
        wrote(11, Some(12), 2, 3),
        saw(13, 14, 3),
        wrote(15, None, 3, 4),
    ];
    assert_eq!(check(&good), Ok(3));
    let bad = [
        // An old content after a newer one was seen.
        vec![wrote(0, Some(9), 0, 1), saw(1, 2, 1), saw(3, 4, 0)],
        // Two replaced the same.
        vec![wrote(0, Some(1), 0, 1), wrote(2, Some(3), 0, 2)],
        // Seen before it was written.
        vec![saw(0, 1, 1), wrote(2, Some(3), 0, 1)],
        // Still seen after it was replaced.
        vec![wrote(0, Some(1), 0, 1), saw(2, 3, 0)],
        // Written over something that never was there.
        vec![wrote(0, Some(1), 7, 8)],
    ];
    for history in bad {
        assert!(check(&history).is_err(), "{history:?}");
    }
}
