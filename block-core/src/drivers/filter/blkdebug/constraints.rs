//! How a blkdebug node wants its requests: what the options ask for, and whether it can be.

use super::options::BlkdebugOptions;
use crate::base::{Error, Result};
use crate::graph::Limits;

/// What the options ask for; 0: nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Constraints {
    align: u64,
    max_transfer: u64,
    opt_write_zero: u64,
    max_write_zero: u64,
    opt_discard: u64,
    max_discard: u64,
}

impl Constraints {
    pub(super) fn new(options: &BlkdebugOptions) -> Result<Self> {
        Ok(Self {
            align: not_negative("align", options.align)?,
            max_transfer: not_negative("max-transfer", options.max_transfer.map(i64::from))?,
            opt_write_zero: not_negative("opt-write-zero", options.opt_write_zero.map(i64::from))?,
            max_write_zero: not_negative("max-write-zero", options.max_write_zero.map(i64::from))?,
            opt_discard: not_negative("opt-discard", options.opt_discard.map(i64::from))?,
            max_discard: not_negative("max-discard", options.max_discard.map(i64::from))?,
        })
    }

    /// The node's limits. `below`: what it would have without constraints; `image`: the image's own alignment.
    pub(super) fn over(self, below: Limits, image: u32) -> Result<Limits> {
        if self.align != 0 && !self.align.is_power_of_two() {
            return Err(cannot("align", self.align));
        }
        let align = fitting("align", self.align, 1)?.unwrap_or(below.request_alignment);
        let unit = u64::from(align.max(image));
        let max_transfer = fitting("max-transfer", self.max_transfer, unit)?;
        let opt_write_zero = fitting("opt-write-zero", self.opt_write_zero, unit)?;
        let max_write_zero = fitting("max-write-zero", self.max_write_zero, unit.max(self.opt_write_zero))?;
        let opt_discard = fitting("opt-discard", self.opt_discard, unit)?;
        let max_discard = fitting("max-discard", self.max_discard, unit.max(self.opt_discard))?;
        Ok(Limits {
            request_alignment: align,
            max_transfer: max_transfer.map_or(below.max_transfer, u64::from),
            write_zeroes_alignment: opt_write_zero.unwrap_or(below.write_zeroes_alignment),
            max_write_zeroes: max_write_zero.map_or(below.max_write_zeroes, u64::from),
            discard_alignment: opt_discard.map_or(below.discard_alignment, |unit| 1 << unit.trailing_zeros()),
            max_discard: max_discard.map_or(below.max_discard, u64::from),
            listens: true,
            ..below
        })
    }

    /// Discards are passed on in multiples of this, which need not be a power of two as the node's limits are.
    pub(super) fn discard_unit(self) -> u64 {
        self.opt_discard.max(1)
    }
}

fn not_negative(name: &str, value: Option<i64>) -> Result<u64> {
    let value = value.unwrap_or(0);
    let out_of_range = |_| Error::new(format!("Value '{value}' is out of range for parameter '{name}'"));
    u64::try_from(value).map_err(out_of_range)
}

/// A constraint that is a multiple of `unit`; `None` where there is none.
fn fitting(name: &str, value: u64, unit: u64) -> Result<Option<u32>> {
    let fits = |bytes: &u32| *bytes < i32::MAX.unsigned_abs() && value.is_multiple_of(unit);
    match value {
        0 => Ok(None),
        _ => u32::try_from(value).ok().filter(fits).map(Some).ok_or_else(|| cannot(name, value)),
    }
}

fn cannot(name: &str, value: u64) -> Error {
    Error::new(format!("Cannot meet constraints with {name} {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(options: &BlkdebugOptions, image: u32) -> Result<Limits> {
        Constraints::new(options)?.over(Limits::ANY, image)
    }

    #[test]
    fn nothing_asked_for_changes_nothing() {
        let zeroes = BlkdebugOptions { align: Some(0), max_transfer: Some(0), ..BlkdebugOptions::default() };
        for options in [BlkdebugOptions::default(), zeroes] {
            assert_eq!(over(&options, 4096).unwrap(), Limits { listens: true, ..Limits::ANY });
        }
    }

    #[test]
    fn the_images_own_blocks_count_too() {
        let options = BlkdebugOptions { max_transfer: Some(512), ..BlkdebugOptions::default() };
        assert_eq!(over(&options, 512).unwrap().max_transfer, 512);
        assert_eq!(over(&options, 4096).unwrap_err().full(), "Cannot meet constraints with max-transfer 512");
    }

    #[test]
    fn an_odd_discard_unit_is_told_by_its_power_of_two() {
        let options = BlkdebugOptions { opt_discard: Some(1536), ..BlkdebugOptions::default() };
        assert_eq!(over(&options, 512).unwrap().discard_alignment, 512);
        assert_eq!(Constraints::new(&options).unwrap().discard_unit(), 1536);
    }
}
