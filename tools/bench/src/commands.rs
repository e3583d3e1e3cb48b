//! The commands, one file each, and what they share: the two servers, medians, verdicts.

pub(crate) mod attach;
mod cell;
pub(crate) mod changes;
pub(crate) mod compare;
pub(crate) mod filters;
pub(crate) mod idle;
pub(crate) mod isolation;
pub(crate) mod luks;
pub(crate) mod qcow2;
pub(crate) mod snapshots;
mod table;
pub(crate) mod tools;

use std::io;

use trellis_bench::server::Program;

/// The server that is judged and the one that it is compared with.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) subject: Program,
    pub(crate) peer: Program,
}

impl Pair {
    /// Both, the subject first. The position is also the number of its disk.
    fn both(&self) -> [&Program; 2] {
        [&self.subject, &self.peer]
    }

    /// Names the two, with versions.
    fn introduce(&self) -> io::Result<String> {
        Ok(format!("subject: {}\npeer: {}\n", self.subject.version()?, self.peer.version()?))
    }
}

/// Order of the two servers in a round: alternating, so that neither always comes first.
fn order(round: usize) -> [usize; 2] {
    if round.is_multiple_of(2) { [0, 1] } else { [1, 0] }
}

/// The middle value; of an even number the mean of the middle two. NaN of none.
fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// The least value. NaN of none.
fn least(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().reduce(f64::min).unwrap_or(f64::NAN)
}

fn verdict(pass: bool) -> &'static str {
    if pass { "pass" } else { "MISS" }
}

#[cfg(test)]
mod tests {
    use super::{least, median};

    #[test]
    fn the_median_is_the_middle_and_none_of_none() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!((least([4.0, 1.0, 2.0]) - 1.0).abs() < 1e-9);
        assert!(median([]).is_nan() && least([]).is_nan());
    }
}
