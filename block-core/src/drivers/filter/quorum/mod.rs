//! `quorum`: copies of one disk, which are asked together and vote. Reads go by what most copies say, all else by how
//! it ends for most of them.
//!
//! The vote is `vote.rs`, the options are `options.rs`; here is who is asked, and what becomes of the answer. A write
//! that is under way has reached some copies and not others. So whoever finds a disagreement reads the copies again
//! while nobody writes there, and only what is wrong then is reported and put right. Two writes to one place come one
//! after the other: every copy has to end up with the same one.

mod options;
mod vote;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::{ByteRange, Error, IoError, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{
    Child, ChildChange, ChildId, DirectPlan, DirectRequest, Driver, DriverInfo, EventSink, Extent, Geometry, IoCx,
    Limits, NodeEvent, NodeOptions, PermSet, Perms, Place, Preallocation, QuorumOp, ReopenRequest, Role, Ticket,
    Tracked, WriteFlags,
};
use crate::rt::IoBuf;
use crate::rt::sync::together;
use vote::Ballot;

pub use options::{Conf, QuorumOptions, QuorumReadPattern};

type Done = Result<(), IoError>;

impl Open for QuorumOptions {
    type Driver = Quorum;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Quorum>> {
        let conf = Conf::new(self, site.children.len(), site.common)?;
        let driver = Quorum {
            name: site.name.to_owned(),
            events: site.events,
            tracked: Tracked::default(),
            cannot_free: AtomicBool::default(),
        };
        Ok(Opened { driver, conf, options: site.common })
    }
}

/// The driver. Its copies are all of its children.
pub struct Quorum {
    name: String,
    events: EventSink,
    /// Who writes, and who found a disagreement.
    tracked: Tracked,
    /// A copy could not free what others could.
    cannot_free: AtomicBool,
}

/// What one copy reads.
type Answer = Result<IoBuf, IoError>;

impl Driver for Quorum {
    type Conf = Conf;

    fn geometry(&self, _: &Conf, children: &[Geometry]) -> Result<Geometry> {
        let Some(first) = children.first() else { return Err(Error::new("A quorum has at least one child")) };
        if let Some(other) = children.iter().find(|child| child.size != first.size) {
            return Err(Error::new(format!(
                "Could not refresh total sector count: the children have different sizes ({} and {} bytes)",
                first.size, other.size
            )));
        }
        let limits = children.iter().map(|child| child.limits).fold(NOBODYS, limits_of_both);
        Ok(Geometry { size: first.size, limits })
    }

    /// Where nothing is compared, the first copy answers. If it cannot, the others are asked on the async path.
    #[inline]
    fn direct(&self, conf: &Conf, cx: IoCx<'_>, request: DirectRequest) -> Option<DirectPlan> {
        if conf.compares || request.write {
            return None;
        }
        cx.child(ChildId::FIRST).direct(request)
    }

    async fn read(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Done {
        if conf.compares { self.read_by_vote(conf, cx, at, buf).await } else { self.read_first(cx, at, buf).await }
    }

    async fn write(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Done {
        let data = if conf.has_several() { copied(cx, &buf)? } else { buf };
        let _alone = self.alone(cx, at).await;
        let results = together(copies(cx).map(|copy| copy.write(at, data.clone(), flags))).await;
        self.decided(conf, cx, QuorumOp::Write, at, &results)
    }

    async fn write_zeroes(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Done {
        let _alone = self.alone(cx, at).await;
        let results = together(copies(cx).map(|copy| copy.write_zeroes(at, flags))).await;
        if flags.no_fallback && results.contains(&Err(IoError::Unsupported)) {
            // The caller knows another way, and takes it for all.
            return Err(IoError::Unsupported);
        }
        self.decided(conf, cx, QuorumOp::Write, at, &results)
    }

    /// What is discarded may read as before or as zeroes, and copies that differ in that would disagree. So it is zeroed,
    /// which frees the space where every copy can do that, and stays otherwise.
    ///
    /// What a copy promises need not be what its file system does. Copies that could free nothing, where others did, are
    /// filled with zeroes to agree with them; that is worth nothing, and is done once.
    async fn discard(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange) -> Done {
        if !copies(cx).all(|copy| copy.geometry().limits.unmap_zeroes) || self.cannot_free.load(Ordering::Relaxed) {
            return Err(IoError::Unsupported);
        }
        // Parts of what a copy zeroes at once it would write.
        let Some(at) = at.whole_units(zeroed_at_once(cx)) else { return Ok(()) };
        let _alone = self.alone(cx, at).await;
        let free = WriteFlags { may_unmap: true, no_fallback: true, ..WriteFlags::default() };
        let mut results = together(copies(cx).map(|copy| copy.write_zeroes(at, free))).await;
        if results.iter().all(|result| *result == Err(IoError::Unsupported)) {
            return Err(IoError::Unsupported);
        }
        for (copy, result) in copies(cx).zip(&mut results) {
            if *result == Err(IoError::Unsupported) {
                self.cannot_free.store(true, Ordering::Relaxed);
                *result = copy.write_zeroes(at, WriteFlags::default()).await;
            }
        }
        self.decided(conf, cx, QuorumOp::Write, at, &results)
    }

    async fn flush(&self, conf: &Conf, cx: IoCx<'_>) -> Done {
        let results = together(copies(cx).map(|copy| copy.flush())).await;
        self.decided(conf, cx, QuorumOp::Flush, ByteRange::whole(0), &results)
    }

    async fn map(&self, _: &Conf, cx: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        let statuses = together(copies(cx).map(|copy| copy.status(at))).await;
        self.report_failed(cx, QuorumOp::Read, at, statuses.iter().map(|status| status.err()));
        let (len, is_zero) = vote::agreed(&statuses, at.len());
        Ok(Extent { len, place: if is_zero { Place::Zero { allocated: true } } else { Place::Here } })
    }

    fn passes_sizes(&self, conf: &Conf, size: u64) -> Result<Vec<(ChildId, u64)>> {
        Ok(conf.all_children().map(|child| (child, size)).collect())
    }

    async fn truncate(&self, _: &Conf, _: IoCx<'_>, _: u64, _: Preallocation) -> Result<Conf> {
        Err(Error::new("A quorum has the size of its children"))
    }

    async fn reopen(&self, _: &Conf, _: ReopenRequest<'_>) -> Result<Conf> {
        let Self { name, .. } = self;
        Err(Error::new(format!("Block format 'quorum' used by node '{name}' does not support reopening files")))
    }

    async fn set_active(&self, conf: &Conf, common: NodeOptions, _: Perms) -> Result<Option<Conf>> {
        Ok(Some(conf.under(common)))
    }

    fn next_child(&self, conf: &Conf) -> Result<Option<(String, Role)>> {
        conf.next_child().map(|name| Some((name, Role::Data)))
    }

    fn with_children(&self, conf: &Conf, change: ChildChange<'_>) -> Result<Option<Conf>> {
        conf.after(change).map(Some)
    }

    /// Whoever else wrote to a copy, or changed its size, would make it another than the rest.
    fn child_perms(&self, conf: &Conf, _: ChildId, _: Role, above: Perms, _: bool) -> Perms {
        let repairs = if conf.rewrites() { PermSet::WRITE } else { PermSet::NONE };
        let shares = above.shares & (PermSet::CONSISTENT_READ | PermSet::WRITE_UNCHANGED);
        Perms { uses: above.uses | repairs, shares }
    }

    async fn info(&self, _: &Conf) -> DriverInfo {
        DriverInfo { driver: "quorum", ..DriverInfo::default() }
    }
}

/// At most this much is read from each copy, or copied for all, at once, in bytes.
const PIECE: u64 = 1 << 20;

fn copies(cx: IoCx<'_>) -> impl Iterator<Item = Child<'_>> {
    ChildId::all(cx.children()).map(move |id| cx.child(id))
}

/// What is aligned to this many bytes, no copy has to write in part.
fn zeroed_at_once(cx: IoCx<'_>) -> u64 {
    let units = copies(cx).map(|copy| {
        let limits = copy.geometry().limits;
        u64::from(limits.request_alignment.max(limits.write_zeroes_alignment))
    });
    units.fold(1, |all, unit| match (all, unit) {
        _ if all % unit == 0 => all,
        _ if unit % all == 0 => unit,
        _ => all.saturating_mul(unit),
    })
}

/// A guest can change its memory while it is written from; all copies get the same.
fn copied(cx: IoCx<'_>, buf: &IoBuf) -> Result<IoBuf, IoError> {
    let memory = copies(cx).map(|copy| copy.geometry().limits.memory_alignment).max().unwrap_or(1);
    let copied = room(buf.len(), memory)?;
    copied.copy_from(buf);
    Ok(copied)
}

fn room(len: u64, memory_alignment: u32) -> Result<IoBuf, IoError> {
    IoBuf::alloc(usize::try_from(len).map_err(|_| IoError::NoMemory)?, memory_alignment as usize)
}

/// What a quorum asks for by itself: the copies align what they get. It promises what all of them can do.
const NOBODYS: Limits = Limits { max_transfer: PIECE, fua: true, unmap_zeroes: true, discard: true, ..Limits::ANY };

fn limits_of_both(all: Limits, copy: Limits) -> Limits {
    Limits {
        discard_alignment: all.discard_alignment.max(copy.discard_alignment),
        physical_block: all.physical_block.max(copy.physical_block),
        optimal_transfer: all.optimal_transfer.max(copy.optimal_transfer),
        unmap_zeroes: all.unmap_zeroes && copy.unmap_zeroes,
        discard: all.discard && copy.unmap_zeroes,
        ..all
    }
}

// ---- reads -----------------------------------------------------------------------------------------------------

impl Quorum {
    async fn read_first(&self, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Done {
        let mut result = Err(IoError::Os(libc::EIO));
        for copy in copies(cx) {
            result = copy.read(at, buf.clone()).await;
            let Err(error) = result else { break };
            self.report_bad(copy, QuorumOp::Read, at, Some(error));
        }
        result
    }

    async fn read_by_vote(&self, conf: &Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Done {
        let first = answers(cx, at).await;
        if ballot(cx, &first).is_unanimous() {
            buf.copy_from(&self.elected(conf, cx, at, &first)?.0);
            return Ok(());
        }
        // A write that is under way may have reached some copies only.
        let _alone = self.alone(cx, at).await;
        let again = answers(cx, at).await;
        let (data, wrong) = self.elected(conf, cx, at, &again)?;
        buf.copy_from(&data);
        if conf.rewrites() {
            self.rewrite(wrong, at, data).await;
        }
        Ok(())
    }

    /// What most copies say, and those that say something else.
    fn elected<'g>(
        &self,
        conf: &Conf,
        cx: IoCx<'g>,
        at: ByteRange,
        answers: &[Answer],
    ) -> Result<(IoBuf, Vec<Child<'g>>), IoError> {
        let results: Vec<Done> =
            answers.iter().map(|answer| answer.as_ref().map(drop).map_err(|error| *error)).collect();
        self.decided(conf, cx, QuorumOp::Read, at, &results)?;
        let ballot = ballot(cx, answers);
        let Some(winner) = ballot.winner().filter(|version| version.voters.len() >= conf.threshold) else {
            self.report_failure(at);
            return Err(IoError::Os(libc::EIO));
        };
        let wrong: Vec<_> = ballot.against(winner).collect();
        wrong.iter().for_each(|copy| self.report_bad(*copy, QuorumOp::Read, at, None));
        Ok((winner.says.clone(), wrong))
    }

    /// Puts copies right. One that cannot be stays as it is, and will be found again.
    async fn rewrite(&self, wrong: Vec<Child<'_>>, at: ByteRange, data: IoBuf) {
        for copy in wrong {
            if let Err(error) = copy.write(at, data.clone(), WriteFlags::default()).await {
                self.report_bad(copy, QuorumOp::Write, at, Some(error));
            }
        }
    }
}

async fn answers(cx: IoCx<'_>, at: ByteRange) -> Vec<Answer> {
    let answer = async |copy: Child<'_>| {
        let buf = room(at.len(), copy.geometry().limits.memory_alignment)?;
        copy.read(at, buf.clone()).await.map(|()| buf)
    };
    together(copies(cx).map(answer)).await
}

fn ballot<'g, 'a>(cx: IoCx<'g>, answers: &'a [Answer]) -> Ballot<Child<'g>, &'a IoBuf> {
    let readable = copies(cx).zip(answers).filter_map(|(copy, answer)| Some((copy, answer.as_ref().ok()?)));
    Ballot::of(readable, |one, other| one.has_bytes_of(other))
}

// ---- what all of them need -------------------------------------------------------------------------------------

impl Quorum {
    /// Waits for those who came before and write, or look for who is wrong, in the same place.
    async fn alone(&self, cx: IoCx<'_>, at: ByteRange) -> Ticket<'_> {
        cx.alone(&self.tracked, at, true).await
    }

    /// How a request to all copies ended; who failed is reported.
    fn decided(&self, conf: &Conf, cx: IoCx<'_>, op: QuorumOp, at: ByteRange, results: &[Done]) -> Done {
        self.report_failed(cx, op, at, results.iter().map(|result| result.err()));
        let outcome = vote::outcome(results, conf.threshold);
        if outcome.is_err() && op != QuorumOp::Flush {
            self.report_failure(at);
        }
        outcome
    }

    /// `errors`: each copy's, in order.
    fn report_failed(&self, cx: IoCx<'_>, op: QuorumOp, at: ByteRange, errors: impl Iterator<Item = Option<IoError>>) {
        let failed = copies(cx).zip(errors).filter(|(_, error)| error.is_some());
        failed.for_each(|(copy, error)| self.report_bad(copy, op, at, error));
    }

    fn report_bad(&self, copy: Child<'_>, op: QuorumOp, at: ByteRange, error: Option<IoError>) {
        (self.events)(NodeEvent::QuorumReportBad { node: copy.name().to_owned(), op, error, at });
    }

    fn report_failure(&self, at: ByteRange) {
        (self.events)(NodeEvent::QuorumFailure { node: self.name.clone(), at });
    }
}
