//! `blkdebug`: requests that fail, wait, or are asked for in odd pieces, as a test wants it.
//!
//! `options` is what operators write, `config` the rule file, `rules` decides what an event sets off and which request
//! fails, `breakpoints` suspends requests, `constraints` is how the node wants its requests.

mod breakpoints;
mod config;
mod constraints;
mod options;
mod rules;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use crate::base::{ByteRange, Error, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    ChildId, DebugEvent, DriverInfo, End, Extent, Geometry, IoCx, OpKind, Pause, PermSet, Perms, Place, ReopenRequest,
    Role, WriteFlags,
};
use crate::pipeline::{Filter, Filtered, Request};
use crate::rt::{IoBuf, blocking};

pub use self::breakpoints::Breakpoints;
use self::constraints::Constraints;
pub use self::options::{BlkdebugOptions, BlockPermission, InjectErrorOptions, IoType, SetStateOptions};
use self::rules::{Injected, Rule, Rules};

/// The driver: what lasts through all configurations are its breakpoints.
pub struct Blkdebug {
    image: ChildId,
    breakpoints: Arc<Breakpoints>,
}

/// The options, checked, and how far the rules have come. A reopen starts them anew.
pub struct Conf {
    constraints: Constraints,
    rules: Rules,
    takes: PermSet,
    unshares: PermSet,
}

impl Conf {
    async fn new(options: &BlkdebugOptions) -> Result<Self> {
        let constraints = Constraints::new(options)?;
        let rules = Rules::new(all_rules(options).await?);
        rules.hear(DebugEvent::None);
        let (takes, unshares) = (set_of(&options.take_child_perms), set_of(&options.unshare_child_perms));
        Ok(Self { constraints, rules, takes, unshares })
    }
}

/// Those of the file come before those of the options.
async fn all_rules(options: &BlkdebugOptions) -> Result<Vec<Rule>> {
    let mut rules = match options.config.clone() {
        Some(path) => blocking(move || config::read(&path)).await?,
        None => Vec::new(),
    };
    for inject in options.inject_error.iter().flatten() {
        rules.push(Rule::injecting(inject)?);
    }
    rules.extend(options.set_state.iter().flatten().map(Rule::setting));
    Ok(rules)
}

fn set_of(permissions: &Option<Vec<BlockPermission>>) -> PermSet {
    permissions.iter().flatten().fold(PermSet::NONE, |sum, one| sum | (*one).into())
}

impl Open for BlkdebugOptions {
    type Driver = Filtered<Blkdebug>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Self::Driver>> {
        let driver = Blkdebug { image: site.child("image"), breakpoints: Arc::default() };
        Ok(Opened { driver: Filtered(driver), conf: Conf::new(self).await?, options: site.common })
    }
}

impl Blkdebug {
    /// Where requests can be made to wait.
    pub fn breakpoints(&self) -> Arc<Breakpoints> {
        self.breakpoints.clone()
    }
}

fn io_type(request: Request) -> IoType {
    match (request.kind, request.moves_data) {
        (OpKind::Read, _) => IoType::Read,
        (OpKind::Write, true) => IoType::Write,
        (OpKind::Write, false) => IoType::WriteZeroes,
        (OpKind::Unmap, _) => IoType::Discard,
        (OpKind::Flush, _) => IoType::Flush,
    }
}

/// A request of this kind fails now, if a rule says so.
async fn inject(conf: &Conf, kind: IoType, at: ByteRange) -> Result<(), IoError> {
    let Some(Injected { error, immediately }) = conf.rules.injected(kind, at) else { return Ok(()) };
    if !immediately {
        next_turn().await;
    }
    Err(error)
}

/// Comes back when the thread has served what else there is.
async fn next_turn() {
    let mut asked = false;
    poll_fn(|task| {
        if std::mem::replace(&mut asked, true) {
            return Poll::Ready(());
        }
        task.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Filter for Blkdebug {
    type Conf = Conf;

    fn child(&self) -> ChildId {
        self.image
    }

    fn end(&self, _: &Conf) -> End {
        End::Of(self.image)
    }

    fn geometry(&self, conf: &Conf, child: Geometry, all: &[Geometry]) -> Result<Geometry, Error> {
        let limits = conf.constraints.over(child.limits, self.image.of(all).limits.request_alignment)?;
        Ok(Geometry { limits, ..child })
    }

    fn is_transparent(&self, conf: &Conf, _write: bool) -> bool {
        conf.rules.is_empty() && !self.breakpoints.is_set()
    }

    fn hear(&self, conf: &Conf, _cx: IoCx<'_>, event: DebugEvent) -> Option<Pause> {
        conf.rules.hear(event);
        self.breakpoints.hit(event)
    }

    async fn before(&self, conf: &Conf, _cx: IoCx<'_>, request: Request) -> Result<(), IoError> {
        inject(conf, io_type(request), request.at).await
    }

    /// With `align`, the last block may reach past the image's end: there are zeroes.
    async fn read(&self, _: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let image = cx.child(self.image);
        let Some(inside) = cut_off(at, image.size()) else { return image.read(at, buf).await };
        buf.slice(inside.len(), at.len() - inside.len()).fill(0);
        image.read(inside, buf.slice(0, inside.len())).await
    }

    async fn write(&self, _: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        let image = cx.child(self.image);
        // An end that moves takes the whole block.
        match cut_off(at, image.size()).filter(|_| image.moving_end().is_none()) {
            None => image.write(at, buf, flags).await,
            Some(inside) => image.write(inside, buf.slice(0, inside.len()), flags).await,
        }
    }

    async fn discard(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        match at.whole_units(conf.constraints.discard_unit()) {
            Some(units) => cx.child(self.image).discard(units).await,
            None => Ok(()),
        }
    }

    async fn map(&self, conf: &Conf, _: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        inject(conf, IoType::BlockStatus, at).await?;
        Ok(Extent { len: at.len(), place: Place::Passed(self.image) })
    }

    fn child_perms(&self, conf: &Conf, _: ChildId, role: Role, above: Perms, writable: bool) -> Perms {
        let Perms { uses, shares } = role.child_perms(above, writable);
        Perms { uses: uses | conf.takes, shares: shares.without(conf.unshares) }
    }

    async fn reopen(&self, _: &Conf, request: ReopenRequest<'_>) -> Result<Conf, Error> {
        let own = request.options.downcast_ref::<BlkdebugOptions>();
        Conf::new(own.expect("the catalog reopens a driver with options of its kind")).await
    }

    fn info(&self, _: &Conf) -> DriverInfo {
        DriverInfo { driver: "blkdebug", ..DriverInfo::default() }
    }
}

/// The part of a range that is inside `size`, where that is not all of it.
fn cut_off(at: ByteRange, size: u64) -> Option<ByteRange> {
    (at.end() > size).then(|| at.split(size.saturating_sub(at.start())).0)
}
