//! The machines that are worth most of all sets that fit: a knapsack, exact up to the rounding of its
//! capacity.

/// Parts into which the capacity is cut. Sizes are rounded up to whole parts, so that what is chosen
/// fits for certain, and costs at most one part in a thousand for each machine.
const PARTS: u64 = 4096;

/// Places of the items that are worth most together and whose sizes fit into `capacity`; in order.
pub(crate) fn best(items: &[(u64, u64)], capacity: u64) -> Vec<usize> {
    let total: u128 = items.iter().map(|(size, _)| u128::from(*size)).sum();
    if total <= u128::from(capacity) {
        return (0..items.len()).collect();
    }
    let part = capacity.div_ceil(PARTS).max(1);
    let parts = (capacity / part) as usize;
    // For each room, the worth of the best choice among the items so far; and who is in it.
    let mut worth = vec![0u64; parts + 1];
    let mut taken = vec![vec![false; parts + 1]; items.len()];
    for ((size, value), taken) in items.iter().zip(&mut taken) {
        let size = size.div_ceil(part);
        let Ok(size) = usize::try_from(size) else { continue };
        for room in (size..=parts).rev() {
            let with = worth[room - size].saturating_add((*value).max(1));
            if with > worth[room] {
                worth[room] = with;
                taken[room] = true;
            }
        }
    }
    let mut room = parts;
    let mut chosen = Vec::new();
    for (at, taken) in taken.iter().enumerate().rev() {
        if taken[room] {
            chosen.push(at);
            room -= items[at].0.div_ceil(part) as usize;
        }
    }
    chosen.reverse();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn by_trying_all(items: &[(u64, u64)], capacity: u64) -> u64 {
        let value = |set: u32| {
            let chosen = items.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1);
            let (size, value) =
                chosen.fold((0, 0), |(s, v), (_, (size, value))| (s + size, v + (*value).max(1)));
            if size <= capacity { value } else { 0 }
        };
        (0..1u32 << items.len()).map(value).max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn no_other_set_that_fits_is_worth_more(
            items in prop::collection::vec((0u64..600, 0u64..10), 0..10),
            capacity in 0u64..3000,
        ) {
            // Capacities up to the number of parts are not rounded.
            let chosen = best(&items, capacity);
            let size: u64 = chosen.iter().map(|at| items[*at].0).sum();
            let value: u64 = chosen.iter().map(|at| items[*at].1.max(1)).sum();
            prop_assert!(size <= capacity);
            prop_assert_eq!(value, by_trying_all(&items, capacity));
        }
    }

    #[test]
    fn large_sizes_are_rounded_so_that_what_is_chosen_fits() {
        let items = [(u64::MAX, 9), (3 << 40, 2), (1 << 40, 2), (1 << 39, 1)];
        let chosen = best(&items, 4 << 40);
        let size: u64 = chosen.iter().map(|at| items[*at].0).sum();
        assert!(size <= 4 << 40, "{chosen:?}");
        assert_eq!(chosen, [1, 2]);
    }
}
