//! What has become of each cluster of a snapshot, and who waits for what. Nothing is read or written here.
//!
//! A cluster begins as one *to copy*: the source has its old contents. Whoever is about to change it takes it
//! ([`Clusters::take`]), alone, and settles it when the target has a copy, or when nobody wants the old contents any
//! more. A settled cluster stays so and may be written without asking anybody: one load says that.
//!
//! Readers of the snapshot never wait. What they read from the source they hold ([`Clusters::look`]); whoever has taken
//! a cluster settles it only when nobody holds it, so no write to it can begin before.
//!
//! Model-checked: `block-core/tests/clusters_loom.rs`. Each canary takes one piece away; the models must then fail.

use std::cell::Cell;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

#[cfg(loom)]
use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};
#[cfg(not(loom))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

use slab::Slab;

use crate::base::canary;
use crate::base::{ByteRange, Error, Result};
use crate::bitmap::Bitmap;
use crate::graph::haste::Haste;

/// What becomes of a cluster. The values are its two bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cluster {
    /// The source has its old contents, and nobody is changing that.
    ToCopy = 0,
    /// Somebody has taken it.
    Taken = 1,
    /// The target has its old contents.
    Copied = 2,
    /// Nobody wants its old contents.
    Released = 3,
}

/// The bit that tells settled clusters from the others, of all clusters in a word.
const SETTLED: u64 = 0xaaaa_aaaa_aaaa_aaaa;
/// Clusters in a word.
const IN_A_WORD: u64 = 32;

/// How a taken cluster ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The target has its old contents.
    Copied,
    /// Nobody wants its old contents.
    Released,
}

/// Where a snapshot's contents are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// In the source, as before.
    Source,
    /// In the target: they have been copied.
    Target,
}

/// See the module's head.
pub struct Clusters {
    /// Bytes of the snapshot.
    size: u64,
    /// Bytes of a cluster, a power of two.
    cluster: u64,
    /// Two bits a cluster. Changed only under the lock.
    words: Box<[AtomicU64]>,
    busy: Mutex<Busy>,
}

/// What is going on. Whatever is in here is short-lived.
#[derive(Default)]
struct Busy {
    takers: Slab<Taker>,
    /// Clusters that readers of the snapshot hold, and how to hurry those.
    held: Slab<(Range<u64>, Arc<Haste>)>,
}

struct Taker {
    clusters: Range<u64>,
    /// How they will end, once that is certain.
    end: Option<End>,
    /// How to hurry the taker.
    haste: Arc<Haste>,
    /// The taker itself, where it waits for readers.
    own: Option<Waker>,
    /// Others who want some of the clusters.
    others: Vec<Waker>,
}

impl Clusters {
    /// All of `size` bytes, to copy.
    pub fn new(size: u64, cluster: u64) -> Result<Self> {
        Self::all(size, cluster, 0)
    }

    /// What is dirty of `size` bytes, to copy; nobody wants the rest. Whose bitmap `grows` may have more bytes than that
    /// notes: they have changed.
    pub fn only(size: u64, cluster: u64, dirty: &Bitmap, grows: bool) -> Result<Self> {
        let grown = ByteRange::between(dirty.size(), size).filter(|_| grows);
        if grown.is_none() {
            dirty.check_size(size)?;
        }
        let clusters = Self::all(size, cluster, u64::MAX)?;
        let changed = dirty.dirty().chain(grown.filter(|grown| !grown.is_empty()));
        changed.for_each(|run| clusters.set(&clusters.around(run), Cluster::ToCopy));
        Ok(clusters)
    }

    fn all(size: u64, cluster: u64, word: u64) -> Result<Self> {
        let count = size.div_ceil(cluster);
        if count > MAX_CLUSTERS {
            return Err(Error::new(format!(
                "A snapshot of {count} clusters is more than is supported ({MAX_CLUSTERS}): use a larger \
                 min-cluster-size than {cluster}"
            )));
        }
        let words = (0..count.div_ceil(IN_A_WORD)).map(|_| AtomicU64::new(word)).collect();
        Ok(Self { size, cluster, words, busy: Mutex::default() })
    }

    /// Bytes of the snapshot.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A write to the range destroys nothing that the snapshot still needs.
    #[inline]
    pub fn are_settled(&self, at: ByteRange) -> bool {
        let clusters = self.around(at);
        let mut first = clusters.start;
        while first < clusters.end {
            let count = (IN_A_WORD - first % IN_A_WORD).min(clusters.end - first);
            let wanted = (SETTLED >> (64 - 2 * count)) << (2 * (first % IN_A_WORD));
            // Whoever settled it has finished with the source before (release in `set`).
            if self.word(first).load(Ordering::Acquire) & wanted != wanted {
                return false;
            }
            first += count;
        }
        true
    }

    /// Takes the first clusters of the range that are not settled, at most `most` bytes, and at least one. `haste` is
    /// the taker's.
    pub fn take(self: &Arc<Self>, at: ByteRange, most: u64, haste: &Arc<Haste>) -> Take {
        let clusters = self.around(at);
        let mut busy = self.lock();
        let Some(first) = clusters.clone().find(|cluster| !self.get(*cluster).is_settled()) else {
            return Take::Nothing;
        };
        if self.get(first) == Cluster::Taken {
            let taker = busy.taker_of(first).expect("it is taken").haste.clone();
            return Take::Busy(Wait { clusters: self.clone(), cluster: first, taker });
        }
        let end = first + (most / self.cluster).clamp(1, clusters.end - first);
        let run = first..self.run(first, end, |state| state == Cluster::ToCopy);
        self.set(&run, Cluster::Taken);
        let taker = Taker { clusters: run.clone(), end: None, haste: haste.clone(), own: None, others: Vec::new() };
        let key = busy.takers.insert(taker);
        Take::Ours(Taken { clusters: self.clone(), run, key, over: Cell::new(false) })
    }

    /// Forgets the copies of the range's whole clusters that are settled.
    pub fn release_copied(&self, at: ByteRange) {
        let _busy = self.lock();
        for cluster in self.around(at) {
            if self.get(cluster) == Cluster::Copied {
                self.set(&(cluster..cluster + 1), Cluster::Released);
            }
        }
    }

    /// Where the first bytes of the range are. `None`: nowhere. `haste` is the reader's.
    pub fn look(self: &Arc<Self>, at: ByteRange, haste: &Arc<Haste>) -> Option<Look> {
        let clusters = self.around(at);
        let mut busy = self.lock();
        let first = clusters.clone().next().filter(|_| at.end() <= self.size)?;
        let side = self.side(&busy, first)?;
        let run = first..self.run_of(&busy, first, clusters.end, side);
        let len = self.bytes(&run).intersection(at)?.len();
        let is_held = side == Side::Source && !canary("reader_holds_nothing");
        let held = is_held.then(|| busy.held.insert((run, haste.clone())));
        Some(Look { side, len, held, clusters: self.clone() })
    }

    /// The smallest range of whole clusters around `at`, or what of it is in the snapshot.
    pub fn whole_inside(&self, at: ByteRange) -> Option<ByteRange> {
        let first = at.start().div_ceil(self.cluster);
        let end = if at.end() >= self.size { self.around(at).end } else { at.end() / self.cluster };
        (first < end).then(|| self.bytes(&(first..end)))
    }

    // ---- under the lock ------------------------------------------------------------------------------------------

    fn side(&self, busy: &Busy, cluster: u64) -> Option<Side> {
        let end = match self.get(cluster) {
            Cluster::ToCopy => None,
            Cluster::Taken => busy.taker_of(cluster).and_then(|taker| taker.end),
            Cluster::Copied => Some(End::Copied),
            Cluster::Released => Some(End::Released),
        };
        match end {
            None => Some(Side::Source),
            Some(End::Copied) => Some(Side::Target),
            Some(End::Released) => None,
        }
    }

    /// Where the run of clusters ends that begins at `first` and is on one side.
    fn run_of(&self, busy: &Busy, first: u64, end: u64, side: Side) -> u64 {
        (first..end).find(|cluster| self.side(busy, *cluster) != Some(side)).unwrap_or(end)
    }

    /// Where the run of clusters ends that begins at `first` and is as wanted.
    fn run(&self, first: u64, end: u64, wanted: impl Fn(Cluster) -> bool) -> u64 {
        (first..end).find(|cluster| !wanted(self.get(*cluster))).unwrap_or(end)
    }

    fn get(&self, cluster: u64) -> Cluster {
        match (self.word(cluster).load(Ordering::Relaxed) >> (2 * (cluster % IN_A_WORD))) & 3 {
            0 => Cluster::ToCopy,
            1 => Cluster::Taken,
            2 => Cluster::Copied,
            _ => Cluster::Released,
        }
    }

    fn set(&self, clusters: &Range<u64>, state: Cluster) {
        for cluster in clusters.clone() {
            let shift = 2 * (cluster % IN_A_WORD);
            let word = self.word(cluster);
            let rest = word.load(Ordering::Relaxed) & !(3 << shift);
            // Only holders of the lock write; release: see `are_settled`.
            let order = if canary("relaxed_settle") { Ordering::Relaxed } else { Ordering::Release };
            word.store(rest | (state as u64) << shift, order);
        }
    }

    fn word(&self, cluster: u64) -> &AtomicU64 {
        &self.words[usize::try_from(cluster / IN_A_WORD).expect("MAX_CLUSTERS fits")]
    }

    fn lock(&self) -> MutexGuard<'_, Busy> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clusters that the range touches.
    #[inline]
    fn around(&self, at: ByteRange) -> Range<u64> {
        let end = at.end().min(self.size);
        at.start().min(end) / self.cluster..end.div_ceil(self.cluster)
    }

    fn bytes(&self, clusters: &Range<u64>) -> ByteRange {
        let end = self.size.min(clusters.end.saturating_mul(self.cluster));
        ByteRange::between(clusters.start * self.cluster, end).expect("it lies inside the snapshot")
    }

    /// Ends the time of a taker.
    fn give_up(&self, key: usize, state: Cluster) {
        let others = {
            let mut busy = self.lock();
            let taker = busy.takers.remove(key);
            self.set(&taker.clusters, state);
            taker.others
        };
        others.into_iter().for_each(Waker::wake);
    }
}

impl Cluster {
    fn is_settled(self) -> bool {
        matches!(self, Self::Copied | Self::Released)
    }
}

impl Busy {
    fn taker_of(&self, cluster: u64) -> Option<&Taker> {
        self.takers.iter().map(|(_, taker)| taker).find(|taker| taker.clusters.contains(&cluster))
    }

    fn is_held(&self, clusters: &Range<u64>) -> bool {
        self.held.iter().any(|(_, (held, _))| overlap(held, clusters))
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// What came of [`Clusters::take`].
pub enum Take {
    /// All of the range is settled.
    Nothing,
    /// Somebody else has the first cluster that is not.
    Busy(Wait),
    /// The first such clusters are the caller's.
    Ours(Taken),
}

/// A cluster that somebody else has taken.
pub struct Wait {
    clusters: Arc<Clusters>,
    cluster: u64,
    taker: Arc<Haste>,
}

impl Wait {
    /// Waits until he has it no more, whatever came of it.
    pub async fn over(&self) {
        poll_fn(|cx| self.poll_over(cx)).await;
    }

    /// Hurries him.
    pub fn hurry(&self) {
        self.taker.hurry();
    }

    fn poll_over(&self, cx: &Context<'_>) -> Poll<()> {
        let mut busy = self.clusters.lock();
        let mut takers = busy.takers.iter_mut().map(|(_, taker)| taker);
        let is_his = |taker: &&mut Taker| Arc::ptr_eq(&taker.haste, &self.taker);
        let Some(taker) = takers.find(|taker| taker.clusters.contains(&self.cluster) && is_his(taker)) else {
            return Poll::Ready(());
        };
        if !taker.others.iter().any(|waker| waker.will_wake(cx.waker())) {
            taker.others.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// Clusters that are the owner's alone to settle. Dropped unsettled, they are as before.
pub struct Taken {
    clusters: Arc<Clusters>,
    run: Range<u64>,
    key: usize,
    over: Cell<bool>,
}

impl Taken {
    /// Their bytes.
    pub fn range(&self) -> ByteRange {
        self.clusters.bytes(&self.run)
    }

    /// Settles them, as soon as nobody reads their old contents from the source any more.
    pub async fn settle(&self, end: End) {
        self.clusters.lock().takers[self.key].end = Some(end);
        poll_fn(|cx| self.poll_left(cx)).await;
        self.finish(match end {
            End::Copied => Cluster::Copied,
            End::Released => Cluster::Released,
        });
    }

    /// Hurries those who do. Once it is certain how the clusters end, nobody else begins to.
    pub fn hurry_readers(&self) {
        let readers: Vec<_> = {
            let busy = self.clusters.lock();
            let held = busy.held.iter().filter(|(_, (held, _))| overlap(held, &self.run));
            held.map(|(_, (_, haste))| haste.clone()).collect()
        };
        readers.iter().for_each(|reader| reader.hurry());
    }

    fn poll_left(&self, cx: &Context<'_>) -> Poll<()> {
        let mut busy = self.clusters.lock();
        let held = busy.is_held(&self.run);
        busy.takers[self.key].own = held.then(|| cx.waker().clone());
        if held { Poll::Pending } else { Poll::Ready(()) }
    }

    fn finish(&self, state: Cluster) {
        if !self.over.replace(true) {
            self.clusters.give_up(self.key, state);
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.finish(Cluster::ToCopy);
    }
}

/// Where some bytes of the snapshot are, and that they stay there until this is dropped.
pub struct Look {
    /// Where.
    pub side: Side,
    /// For so many bytes from the start of the range.
    pub len: u64,
    held: Option<usize>,
    clusters: Arc<Clusters>,
}

impl Drop for Look {
    fn drop(&mut self) {
        let Some(key) = self.held else { return };
        let wakers: Vec<Waker> = {
            let mut busy = self.clusters.lock();
            let (left, _) = busy.held.remove(key);
            let takers = busy.takers.iter_mut().filter(|(_, taker)| overlap(&taker.clusters, &left));
            takers.filter_map(|(_, taker)| taker.own.take()).collect()
        };
        if !canary("reader_wakes_nobody") {
            wakers.into_iter().for_each(Waker::wake);
        }
    }
}

/// Clusters of a snapshot at the most: 16 TiB of the smallest, whose states take 64 MiB.
const MAX_CLUSTERS: u64 = 1 << 28;

#[cfg(test)]
mod tests {
    use std::pin::{Pin, pin};

    use super::*;

    const KIB: u64 = 1024;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(start, end).unwrap()
    }

    /// Requests that nobody hurries.
    fn nobody() -> Arc<Haste> {
        Arc::default()
    }

    /// Four clusters of 64 KiB, the last one not complete.
    fn four() -> Arc<Clusters> {
        Arc::new(Clusters::new(200 * KIB, 64 * KIB).unwrap())
    }

    fn taken(clusters: &Arc<Clusters>, at: ByteRange) -> Taken {
        match clusters.take(at, u64::MAX, &nobody()) {
            Take::Ours(taken) => taken,
            Take::Busy(_) => panic!("somebody else has it"),
            Take::Nothing => panic!("it is settled"),
        }
    }

    fn is_ready(future: Pin<&mut impl Future<Output = ()>>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    fn settle(taken: Taken, end: End) {
        assert!(is_ready(pin!(taken.settle(end))), "nobody reads");
    }

    #[test]
    fn whole_clusters_are_taken_once() {
        let clusters = four();
        let first = taken(&clusters, range(70 * KIB, 150 * KIB));
        assert_eq!(first.range(), range(64 * KIB, 192 * KIB));
        assert!(
            matches!(clusters.take(range(0, 65 * KIB), 1, &nobody()), Take::Ours(taken) if taken.range() == range(0, 64 * KIB))
        );
        let Take::Busy(wait) = clusters.take(range(128 * KIB, 200 * KIB), 1, &nobody()) else { panic!("it is taken") };
        let mut wait = pin!(wait.over());
        assert!(!is_ready(wait.as_mut()));
        settle(first, End::Copied);
        assert!(is_ready(wait));
        assert!(clusters.are_settled(range(64 * KIB, 192 * KIB)));
        assert!(!clusters.are_settled(range(64 * KIB, 193 * KIB)) && !clusters.are_settled(range(63 * KIB, 65 * KIB)));
        assert_eq!(taken(&clusters, range(130 * KIB, 200 * KIB)).range(), range(192 * KIB, 200 * KIB));
    }

    #[test]
    fn what_is_given_up_can_be_taken_again() {
        let clusters = four();
        drop(taken(&clusters, range(0, 1)));
        assert!(!clusters.are_settled(range(0, 1)));
        let _again = taken(&clusters, range(0, 1));
    }

    #[test]
    fn nothing_is_settled_while_a_reader_is_at_the_source() {
        let clusters = four();
        let before = clusters.look(range(0, 200 * KIB), &nobody()).unwrap();
        assert_eq!((before.side, before.len), (Side::Source, 200 * KIB));
        let copy = taken(&clusters, range(0, 1));
        // The source is still as it was.
        let beside = clusters.look(range(0, 512), &nobody()).unwrap();
        assert_eq!(beside.side, Side::Source);
        let mut settling = pin!(copy.settle(End::Copied));
        assert!(!is_ready(settling.as_mut()) && !clusters.are_settled(range(0, 1)));
        // Who comes now finds the copy, so the writer has an end to wait for.
        let after = clusters.look(range(0, 100 * KIB), &nobody()).unwrap();
        assert_eq!((after.side, after.len), (Side::Target, 64 * KIB));
        drop(before);
        assert!(!is_ready(settling.as_mut()));
        drop(beside);
        assert!(is_ready(settling));
        assert!(clusters.are_settled(range(0, 64 * KIB)));
    }

    #[test]
    fn what_is_released_is_nowhere() {
        let clusters = four();
        settle(taken(&clusters, range(0, 1)), End::Copied);
        settle(taken(&clusters, range(64 * KIB, 65 * KIB)), End::Released);
        clusters.release_copied(range(0, 64 * KIB));
        assert!(
            clusters.look(range(0, 1), &nobody()).is_none()
                && clusters.look(range(64 * KIB, 65 * KIB), &nobody()).is_none()
        );
        assert!(clusters.are_settled(range(0, 128 * KIB)));
        assert!(clusters.look(range(128 * KIB, 201 * KIB), &nobody()).is_none(), "past the end there is nothing");
    }

    #[test]
    fn only_whole_clusters_are_released_but_the_last_one_may_be_short() {
        let clusters = four();
        assert_eq!(clusters.whole_inside(range(1, 130 * KIB)), Some(range(64 * KIB, 128 * KIB)));
        assert_eq!(clusters.whole_inside(range(1, 100 * KIB)), None);
        assert_eq!(clusters.whole_inside(range(192 * KIB, 200 * KIB)), Some(range(192 * KIB, 200 * KIB)));
        assert_eq!(clusters.whole_inside(range(192 * KIB, 199 * KIB)), None);
    }

    #[test]
    fn only_what_is_dirty_is_kept() {
        let dirty = Bitmap::new(200 * KIB, 512).unwrap();
        dirty.mark(range(100 * KIB, 129 * KIB));
        let clusters = Arc::new(Clusters::only(200 * KIB, 64 * KIB, &dirty, false).unwrap());
        assert!(clusters.are_settled(range(0, 64 * KIB)) && clusters.are_settled(range(192 * KIB, 200 * KIB)));
        assert!(clusters.look(range(0, 1), &nobody()).is_none());
        assert_eq!(taken(&clusters, range(0, 200 * KIB)).range(), range(64 * KIB, 192 * KIB));
        Clusters::only(201 * KIB, 64 * KIB, &dirty, false).err().unwrap();
        Clusters::only(199 * KIB, 64 * KIB, &dirty, true).err().unwrap();
        let grown = Arc::new(Clusters::only(201 * KIB, 64 * KIB, &dirty, true).unwrap());
        assert!(grown.are_settled(range(0, 64 * KIB)));
        assert_eq!(taken(&grown, range(0, 201 * KIB)).range(), range(64 * KIB, 201 * KIB));
    }

    #[test]
    fn words_are_left_and_entered_in_the_right_place() {
        let clusters = Arc::new(Clusters::new(100, 1).unwrap());
        for (start, end) in [(31, 33), (0, 1), (63, 64), (33, 63), (64, 100), (1, 31)] {
            assert!(!clusters.are_settled(range(start, end)));
            settle(taken(&clusters, range(start, end)), End::Copied);
            assert!(clusters.are_settled(range(start, end)));
        }
        assert!(clusters.are_settled(range(0, 100)));
    }

    #[test]
    fn a_snapshot_of_too_many_clusters_is_refused() {
        let most = MAX_CLUSTERS * 64 * KIB;
        let refused = Clusters::new(most + 1, 64 * KIB).err().unwrap().full();
        assert!(refused.contains("larger min-cluster-size"), "{refused}");
        assert_eq!(Clusters::new(i64::MAX as u64, 1 << 62).unwrap().words.len(), 1);
    }
}
