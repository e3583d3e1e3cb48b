//! `throttle`: requests wait for the limits of a throttle group, which the node may share with others.
//!
//! `limits` are the options, `bucket` the arithmetic, `line` who is next, `turnstile` the lock around it, `group` the
//! wait across threads.

mod bucket;
mod group;
mod limits;
mod line;
#[doc(hidden)] // public for the models alone
pub mod turnstile;

use qmp::Qapi;

use self::bucket::Direction;
use crate::base::{Error, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{ChildId, DriverInfo, End, IoCx, Objects, OpKind, ReopenRequest};
use crate::pipeline::{Filter, Filtered, Request};

pub use self::group::{Member, ThrottleGroup};
pub use self::limits::{FlatThrottleLimits, Limits, Rate, Rates, ThrottleGroupOptions, ThrottleLimits};

/// Requests wait for the limits of a group.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsThrottle")]
pub struct ThrottleOptions {
    /// The id of a `throttle-group` object.
    pub throttle_group: String,
}

impl ThrottleOptions {
    fn join(&self, objects: &Objects) -> Result<Member> {
        let id = &self.throttle_group;
        let group = objects.find::<ThrottleGroup>(id);
        Ok(group.ok_or_else(|| Error::new(format!("Throttle group '{id}' does not exist")))?.join())
    }
}

impl Open for ThrottleOptions {
    type Driver = Filtered<Throttle>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Filtered<Throttle>>> {
        let driver = Filtered(Throttle { file: site.child("file") });
        Ok(Opened { driver, conf: self.join(site.objects)?, options: site.common })
    }
}

/// The filter. Its configuration is the membership in its group.
pub struct Throttle {
    file: ChildId,
}

impl Filter for Throttle {
    type Conf = Member;

    fn child(&self) -> ChildId {
        self.file
    }

    fn end(&self, _: &Member) -> End {
        End::Of(self.file)
    }

    #[inline]
    fn is_transparent(&self, member: &Member, write: bool) -> bool {
        member.is_free(if write { Direction::Write } else { Direction::Read })
    }

    async fn before(&self, member: &Member, cx: IoCx<'_>, request: Request) -> Result<(), IoError> {
        let direction = match request.kind {
            OpKind::Read => Direction::Read,
            OpKind::Write | OpKind::Unmap => Direction::Write,
            OpKind::Flush => return Ok(()),
        };
        if !member.is_free(direction) {
            // None: our root is being drained, so this request passes at once, and the others do not pay for it.
            let _ = cx.unless_hurried(member.admitted(cx.local(), direction, request.at.len())).await;
        }
        Ok(())
    }

    async fn reopen(&self, _: &Member, request: ReopenRequest<'_>) -> Result<Member> {
        let own = request.options.downcast_ref::<ThrottleOptions>();
        own.expect("the catalog reopens a driver with options of its kind").join(request.objects)
    }

    fn info(&self, _: &Member) -> DriverInfo {
        DriverInfo { driver: "throttle", ..DriverInfo::default() }
    }
}
