//! Statistics that say no more than the samples do.

/// Below this many samples a 99th percentile is one of the two largest values and means nothing.
const ENOUGH_FOR_P99: usize = 200;

/// Measured values, sorted. Not a number and infinities are refused at the door.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Takes measured values; `None` if one of them is not a finite number.
    pub fn new(values: impl IntoIterator<Item = f64>) -> Option<Samples> {
        let mut values: Vec<f64> = values.into_iter().collect();
        if values.iter().any(|value| !value.is_finite()) {
            return None;
        }
        values.sort_by(f64::total_cmp);
        Some(Samples(values))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The smallest.
    pub fn min(&self) -> Option<f64> {
        self.0.first().copied()
    }

    /// The largest.
    pub fn max(&self) -> Option<f64> {
        self.0.last().copied()
    }

    /// The middle one, or the mean of the two in the middle.
    pub fn median(&self) -> Option<f64> {
        let middle = self.0.len() / 2;
        match self.0.len() {
            0 => None,
            length if length.is_multiple_of(2) => {
                Some(f64::midpoint(self.0[middle - 1], self.0[middle]))
            }
            _ => Some(self.0[middle]),
        }
    }

    /// The value that 99 of 100 samples do not exceed; `None` from fewer than 200 samples.
    pub fn p99(&self) -> Option<f64> {
        let rank = (self.0.len() * 99).div_ceil(100);
        (self.0.len() >= ENOUGH_FOR_P99).then(|| self.0[rank - 1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        let median = |values: &[f64]| Samples::new(values.iter().copied()).unwrap().median();
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_99th_percentile_needs_200_samples() {
        let upto = |count: u32| Samples::new((1..=count).map(f64::from)).unwrap();
        assert_eq!(upto(199).p99(), None);
        assert_eq!(upto(200).p99(), Some(198.0));
        assert_eq!(upto(1000).p99(), Some(990.0));
        assert_eq!((upto(5).min(), upto(5).max(), upto(5).count()), (Some(1.0), Some(5.0), 5));
    }

    #[test]
    fn what_is_no_number_is_no_sample() {
        assert_eq!(Samples::new([1.0, f64::NAN]), None);
        assert_eq!(Samples::new([f64::INFINITY]), None);
    }
}
