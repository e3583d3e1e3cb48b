//! What a throttle group lets through: the options as QMP has them, and the limits that they make once they have been
//! checked.

use qmp::Qapi;

use crate::base::{Error, Result};

/// How fast one kind of thing may pass, and how far bursts may go beyond that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Units a second in the long run; 0: any number.
    pub rate: u64,
    /// Units a second in a burst; 0: there are no bursts.
    pub burst: u64,
    /// How long a burst at its full rate may last, in seconds.
    pub burst_seconds: u32,
}

/// One rate for all requests, or one for reads and one for writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Rates {
    /// Reads and writes together.
    pub total: Rate,
    /// Reads.
    pub read: Rate,
    /// Writes, writes of zeroes and discards.
    pub write: Rate,
}

/// Limits that contradict neither each other nor arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Limits {
    /// Requests.
    pub iops: Rates,
    /// Bytes.
    pub bps: Rates,
    /// A larger request counts as several of this many bytes; 0: it counts as one.
    pub iops_size: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { rate: 0, burst: 0, burst_seconds: 1 }
    }
}

/// The options of a throttle group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "ThrottleGroupProperties")]
pub struct ThrottleGroupOptions {
    /// What the members of the group may do together. They go before the flat properties.
    pub limits: Option<ThrottleLimits>,
    /// The same limits one by one; they cannot be changed later.
    #[qapi(flatten)]
    pub flat: FlatThrottleLimits,
}

impl ThrottleGroupOptions {
    /// The limits of a new group.
    pub fn checked(self) -> Result<Limits> {
        self.limits.unwrap_or_default().or(self.flat.into()).over(Limits::default())
    }
}

/// A line is an option: what it means, its name, its name among an object's flat properties, how its value is read, and
/// which limit it is.
macro_rules! limits {
    ($($(#[$doc:meta])* $name:ident $flat:literal: $read:ident $($limit:ident).+;)*) => {
        /// The limits of a throttle group; what is absent stays as it is, and in a new group is 0.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
        pub struct ThrottleLimits {
            $($(#[$doc])* pub $name: Option<i64>,)*
        }

        /// The same limits as properties of the object itself.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
        pub struct FlatThrottleLimits {
            $($(#[$doc])* #[qapi(rename = $flat, feature = "unstable")] pub $name: Option<i64>,)*
        }

        impl From<FlatThrottleLimits> for ThrottleLimits {
            fn from(flat: FlatThrottleLimits) -> Self {
                Self { $($name: flat.$name,)* }
            }
        }

        impl From<Limits> for ThrottleLimits {
            fn from(limits: Limits) -> Self {
                Self { $($name: i64::try_from(limits.$($limit).+).ok(),)* }
            }
        }

        impl ThrottleLimits {
            /// The names of the flat properties.
            pub const FLAT: &[&str] = &[$($flat),*];

            /// These options, and where they are absent those.
            #[must_use]
            pub fn or(self, other: Self) -> Self {
                Self { $($name: self.$name.or(other.$name),)* }
            }

            fn set(&self, limits: &mut Limits) -> Result<()> {
                $(if let Some(value) = self.$name {
                    limits.$($limit).+ = $read(&stringify!($name).replace('_', "-"), value)?;
                })*
                Ok(())
            }
        }
    };
}

limits! {
    /// Requests a second, reads and writes together.
    iops_total "x-iops-total": rate iops.total.rate;
    /// Requests a second in a burst.
    iops_total_max "x-iops-total-max": rate iops.total.burst;
    /// How long such a burst may last, in seconds; 1 if never given. Longer ones need `iops-total-max`.
    iops_total_max_length "x-iops-total-max-length": seconds iops.total.burst_seconds;
    /// Reads a second.
    iops_read "x-iops-read": rate iops.read.rate;
    /// Reads a second in a burst.
    iops_read_max "x-iops-read-max": rate iops.read.burst;
    /// How long such a burst may last, in seconds; 1 if never given. Longer ones need `iops-read-max`.
    iops_read_max_length "x-iops-read-max-length": seconds iops.read.burst_seconds;
    /// Writes a second.
    iops_write "x-iops-write": rate iops.write.rate;
    /// Writes a second in a burst.
    iops_write_max "x-iops-write-max": rate iops.write.burst;
    /// How long such a burst may last, in seconds; 1 if never given. Longer ones need `iops-write-max`.
    iops_write_max_length "x-iops-write-max-length": seconds iops.write.burst_seconds;
    /// Bytes a second, read and written together.
    bps_total "x-bps-total": rate bps.total.rate;
    /// Bytes a second in a burst.
    bps_total_max "x-bps-total-max": rate bps.total.burst;
    /// How long such a burst may last, in seconds; 1 if never given. Longer ones need `bps-total-max`.
    bps_total_max_length "x-bps-total-max-length": seconds bps.total.burst_seconds;
    /// Bytes read a second.
    bps_read "x-bps-read": rate bps.read.rate;
    /// Bytes read a second in a burst.
    bps_read_max "x-bps-read-max": rate bps.read.burst;
    /// How long such a burst may last, in seconds; 1 if never given. Longer ones need `bps-read-max`.
    bps_read_max_length "x-bps-read-max-length": seconds bps.read.burst_seconds;
    /// Bytes written a second.
    bps_write "x-bps-write": rate bps.write.rate;
    /// Bytes written a second in a burst.
    bps_write_max "x-bps-write-max": rate bps.write.burst;
    /// How long such a burst may last, in seconds; 1 if never given. Longer ones need `bps-write-max`.
    bps_write_max_length "x-bps-write-max-length": seconds bps.write.burst_seconds;
    /// A request of more bytes than this counts as several; needs a limit on requests.
    iops_size "x-iops-size": bytes iops_size;
}

impl ThrottleLimits {
    /// The limits that come of `old` with these options.
    pub fn over(&self, old: Limits) -> Result<Limits> {
        let mut limits = old;
        self.set(&mut limits)?;
        limits.check().map(|()| limits)
    }
}

fn rate(_: &str, value: i64) -> Result<u64> {
    let rate = u64::try_from(value).ok().filter(|rate| *rate <= MAX_RATE);
    rate.ok_or_else(|| Error::new(format!("bps/iops/max values must be within [0, {MAX_RATE}]")))
}

fn seconds(name: &str, value: i64) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::new(format!("{name} value must be in the range [0, {}]", u32::MAX)))
}

fn bytes(name: &str, value: i64) -> Result<u64> {
    u64::try_from(value).map_err(|_| Error::new(format!("{name} value must be in the range [0, {}]", i64::MAX)))
}

impl Limits {
    fn check(&self) -> Result<()> {
        if self.iops.contradict() || self.bps.contradict() {
            let both = "bps/iops/max total values and read/write values cannot be used at the same time";
            return Err(Error::new(both));
        }
        if self.iops_size > 0 && self.iops.all().iter().all(|rate| rate.rate == 0) {
            return Err(Error::new("iops size requires an iops value to be set"));
        }
        self.iops.all().iter().chain(&self.bps.all()).try_for_each(Rate::check)
    }
}

impl Rates {
    fn all(&self) -> [Rate; 3] {
        [self.total, self.read, self.write]
    }

    fn contradict(&self) -> bool {
        let both = |of: fn(&Rate) -> u64| of(&self.total) > 0 && (of(&self.read) > 0 || of(&self.write) > 0);
        both(|rate| rate.rate) || both(|rate| rate.burst)
    }
}

impl Rate {
    fn check(&self) -> Result<()> {
        let Self { rate, burst, burst_seconds } = *self;
        let wrong = if burst_seconds == 0 {
            "the burst length cannot be 0"
        } else if burst_seconds > 1 && burst == 0 {
            "burst length set without burst rate"
        } else if burst > 0 && u64::from(burst_seconds) > MAX_RATE / burst {
            "burst length too high for this burst rate"
        } else if burst > 0 && rate == 0 {
            "bps_max/iops_max require corresponding bps/iops values"
        } else if burst > 0 && burst < rate {
            "bps_max/iops_max cannot be lower than bps/iops"
        } else {
            return Ok(());
        };
        Err(Error::new(wrong))
    }
}

/// QEMU's largest rate, in units a second. A burst may not let more units than this through either.
const MAX_RATE: u64 = 1_000_000_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: serde_json::Value) -> Result<Limits, String> {
        let options: ThrottleLimits = qmp::schema::from_value(json).map_err(|error: qmp::Error| error.desc)?;
        options.over(Limits::default()).map_err(|error| error.full())
    }

    /// GR-24: all zero, 2^63 bytes a second, a burst below the rate; in the words that qemu-storage-daemon 10.0.2 uses.
    #[test]
    fn limits_follow_qemus_rules() {
        use serde_json::json;
        let most = 1_000_000_000_000_000_u64;
        let both = "bps/iops/max total values and read/write values cannot be used at the same time";
        let within = "bps/iops/max values must be within [0, 1000000000000000]";
        for (options, reason) in [
            (json!({ "iops-total": 1, "iops-read": 1 }), both),
            (json!({ "bps-total": 1, "bps-write": 1 }), both),
            (json!({ "iops-total-max": 5 }), "bps_max/iops_max require corresponding bps/iops values"),
            (json!({ "iops-total": 1, "iops-read-max": 5 }), "bps_max/iops_max require corresponding bps/iops values"),
            (json!({ "iops-total": 10, "iops-total-max": 5 }), "bps_max/iops_max cannot be lower than bps/iops"),
            (json!({ "iops-total": 10, "iops-total-max-length": 2 }), "burst length set without burst rate"),
            (json!({ "iops-total-max-length": 0 }), "the burst length cannot be 0"),
            (
                json!({ "iops-total": 1, "iops-total-max": most, "iops-total-max-length": 2 }),
                "burst length too high for this burst rate",
            ),
            (json!({ "iops-total": -1 }), within),
            (json!({ "bps-read": most + 1 }), within),
            (json!({ "bps-write-max": 1_u64 << 62 }), within),
            (json!({ "bps-total": 1_u64 << 63 }), "Invalid parameter type for 'bps-total', expected: integer"),
            (
                json!({ "bps-read-max-length": 1_u64 << 40 }),
                "bps-read-max-length value must be in the range [0, 4294967295]",
            ),
            (json!({ "iops-size": 512 }), "iops size requires an iops value to be set"),
            (
                json!({ "iops-read": 1, "iops-size": -1 }),
                "iops-size value must be in the range [0, 9223372036854775807]",
            ),
        ] {
            assert_eq!(checked(options).unwrap_err(), reason);
        }
        for options in [
            json!({}),
            json!({ "bps-total": 0, "bps-read": 0, "bps-write": 0, "iops-total": 0, "iops-size": 0 }),
            json!({ "iops-total": most, "iops-total-max": most, "iops-total-max-length": 1 }),
            json!({ "iops-total": 10, "iops-total-max": 10 }),
            json!({ "iops-total": 10, "bps-read": 10, "bps-write": 20, "iops-size": i64::MAX }),
        ] {
            checked(options).unwrap();
        }
    }

    #[test]
    fn what_is_left_out_stays() {
        let old = Limits {
            bps: Rates { read: Rate { rate: 9, ..Rate::default() }, ..Rates::default() },
            ..Limits::default()
        };
        let more = ThrottleLimits { iops_total: Some(7), ..ThrottleLimits::default() };
        let new = more.over(old).unwrap();
        assert_eq!((new.bps.read.rate, new.iops.total.rate), (9, 7));
        assert_eq!(ThrottleLimits::from(new).over(Limits::default()).unwrap(), new);
        let flat = FlatThrottleLimits { iops_total: Some(7), ..FlatThrottleLimits::default() };
        assert_eq!(ThrottleLimits::from(flat), more);
    }
}
