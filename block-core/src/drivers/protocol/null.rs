//! `null-co` and `null-aio`: a disk of nothing, for tests and measurements. Both names mean the same driver here.
//!
//! With a latency every request sleeps that long, and no drain cuts it short: the device stands for a slow one.

use std::time::Duration;

use qmp::Qapi;

use crate::base::{ByteRange, Error, IoError, Result, SECTOR, align_up};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    Direct, DirectPlan, DirectRequest, Driver, DriverInfo, Extent, Geometry, IoCx, Limits, Place, Preallocation,
    ReopenRequest, WriteFlags,
};
use crate::rt::IoBuf;

/// A disk without contents: writes vanish, reads leave the buffer as it is.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsNull")]
pub struct NullOptions {
    /// The size in bytes.
    #[qapi(default = 1 << 30)]
    pub size: i64,
    /// How long each request takes, in nanoseconds, at most 2^63 - 1.
    #[qapi(default = 0)]
    pub latency_ns: u64,
    /// Reads fill the buffer with zeroes.
    #[qapi(default = false)]
    pub read_zeroes: bool,
}

/// The same under QEMU's other name for it.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsNullAio")]
pub struct NullAioOptions {
    /// What `null-co` takes.
    #[qapi(flatten)]
    pub null: NullOptions,
}

impl Open for NullOptions {
    type Driver = Null;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Null>> {
        Ok(Opened { driver: Null { name: "null-co" }, conf: Conf::new(self)?, options: site.common })
    }
}

impl Open for NullAioOptions {
    type Driver = Null;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Null>> {
        Ok(Opened { driver: Null { name: "null-aio" }, conf: Conf::new(&self.null)?, options: site.common })
    }
}

/// The driver: it has nothing that requests change.
pub struct Null {
    name: &'static str,
}

/// The options, checked.
pub struct Conf {
    size: u64,
    latency: Duration,
    read_zeroes: bool,
}

impl Conf {
    fn new(options: &NullOptions) -> Result<Self> {
        Ok(Self {
            size: sectors(options.size)?,
            latency: latency(options.latency_ns)?,
            read_zeroes: options.read_zeroes,
        })
    }

    async fn sleep(&self, cx: IoCx<'_>) {
        if !self.latency.is_zero() {
            cx.local().sleep(self.latency).await;
        }
    }
}

fn latency(nanos: u64) -> Result<Duration> {
    let in_range = i64::try_from(nanos).is_ok();
    in_range
        .then(|| Duration::from_nanos(nanos))
        .ok_or_else(|| Error::new(format!("latency-ns is invalid: {nanos} is more than 2^63 - 1")))
}

/// The size in whole sectors, as QEMU rounds it.
fn sectors(size: i64) -> Result<u64> {
    let bytes = u64::try_from(size).ok().and_then(|size| align_up(size, SECTOR));
    bytes
        .filter(|bytes| *bytes <= LARGEST)
        .ok_or_else(|| Error::new(format!("Value '{size}' is out of range for parameter 'size'")))
}

/// The largest disk that QEMU takes: a multiple of the largest block that a disk may have.
const LARGEST: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

impl Driver for Null {
    type Conf = Conf;

    fn geometry(&self, conf: &Conf, _children: &[Geometry]) -> Result<Geometry> {
        let limits = Limits { fua: true, unmap_zeroes: true, discard: true, ..Limits::ANY };
        Ok(Geometry { size: conf.size, limits })
    }

    #[inline]
    fn direct(&self, conf: &Conf, _cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan> {
        if !conf.latency.is_zero() {
            return None;
        }
        let zeroed = conf.read_zeroes && !request.write;
        Some(DirectPlan::new(if zeroed { Direct::Zeroed } else { Direct::Done }))
    }

    async fn read(&self, conf: &Conf, cx: IoCx<'_>, _at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        conf.sleep(cx).await;
        if conf.read_zeroes {
            buf.fill_in_steps(0).await;
        }
        Ok(())
    }

    async fn write(
        &self,
        conf: &Conf,
        cx: IoCx<'_>,
        _at: ByteRange,
        _buf: IoBuf,
        _flags: WriteFlags,
    ) -> Result<(), IoError> {
        conf.sleep(cx).await;
        Ok(())
    }

    async fn write_zeroes(&self, conf: &Conf, cx: IoCx<'_>, _at: ByteRange, _flags: WriteFlags) -> Result<(), IoError> {
        conf.sleep(cx).await;
        Ok(())
    }

    async fn discard(&self, conf: &Conf, cx: IoCx<'_>, _at: ByteRange) -> Result<(), IoError> {
        conf.sleep(cx).await;
        Ok(())
    }

    async fn flush(&self, conf: &Conf, cx: IoCx<'_>) -> Result<(), IoError> {
        conf.sleep(cx).await;
        Ok(())
    }

    async fn map(&self, conf: &Conf, _cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        let place = if conf.read_zeroes { Place::Zero { allocated: true } } else { Place::Here };
        Ok(Extent { len: at.len(), place })
    }

    async fn truncate(&self, _: &Conf, _: IoCx<'_>, _size: u64, _: Preallocation) -> Result<Conf> {
        Err(Error::new("Image format driver does not support resize"))
    }

    async fn reopen(&self, _conf: &Conf, request: ReopenRequest<'_>) -> Result<Conf> {
        let options = request.options;
        let own = options.downcast_ref::<NullOptions>();
        let own = own.or_else(|| options.downcast_ref::<NullAioOptions>().map(|aio| &aio.null));
        Conf::new(own.expect("the catalog reopens a driver with options of its kind"))
    }

    async fn info(&self, _conf: &Conf) -> DriverInfo {
        DriverInfo {
            driver: self.name,
            filename: format!("{}://", self.name),
            allocated: Some(0),
            ..DriverInfo::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(size: i64) -> NullOptions {
        NullOptions { size, latency_ns: 0, read_zeroes: false }
    }

    #[test]
    fn sizes_are_whole_sectors_up_to_the_largest_disk() {
        assert_eq!(Conf::new(&options(0)).unwrap().size, 0);
        assert_eq!(Conf::new(&options(1)).unwrap().size, 512);
        assert_eq!(Conf::new(&options(1024)).unwrap().size, 1024);
        let largest = LARGEST.cast_signed();
        assert_eq!(Conf::new(&options(largest)).unwrap().size, LARGEST);
        for refused in [-1, i64::MIN, i64::MAX, largest + 1] {
            assert!(Conf::new(&options(refused)).is_err(), "{refused}");
        }
    }

    #[test]
    fn latencies_are_those_that_qemu_takes() {
        let with = |latency_ns| Conf::new(&NullOptions { latency_ns, ..options(0) });
        let largest = i64::MAX.cast_unsigned();
        assert!(with(largest).is_ok());
        assert!(with(largest + 1).is_err());
    }

    #[test]
    fn absent_options_are_qemus_defaults() {
        let parsed: NullOptions = qmp::schema::from_value(serde_json::json!({})).unwrap();
        assert_eq!(parsed, options(1 << 30));
    }
}
