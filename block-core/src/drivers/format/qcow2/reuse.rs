//! What becomes of clusters that are free: they rest until nobody can be using them any more, the file below is told, and
//! then they are handed out again.
//!
//! | a cluster is | until |
//! |---|---|
//! | unlinked in memory (`Meta::freed`) | a commit: nothing in the file leads to it, and its refcount is lowered |
//! | waiting | a period begins; there is one at a time |
//! | resting | all who may have found it before are gone (`graph/grace.rs`) |
//! | being punched | the file below has heard of it |
//! | free | somebody takes it |
//!
//! So neither a reader nor a writer that is late meets a hole or another's data. Room that came to nothing goes the same
//! way: what was to be written there may still be under way. Periods are looked after by commits and by those who need
//! room; a drained node needs none (`Image::settle`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::Image;
use super::meta::Run;
use crate::base::{ByteRange, IoError};
use crate::graph::{Grace, IoCx};
use crate::rt::within;

/// Clusters between the refcount that became 0 and the allocator.
#[derive(Default)]
pub(super) struct Reuse {
    waiting: Vec<Run>,
    resting: Vec<(Grace, Vec<Run>)>,
    /// How often something was set free.
    released: u64,
}

impl Reuse {
    /// Nothing in the file leads to the clusters any more, and their refcount is 0.
    pub(super) fn rest(&mut self, run: Run) {
        push(&mut self.waiting, run);
    }

    /// What a period may begin for, if there is none.
    fn batch(&mut self) -> Option<Vec<Run>> {
        let begins = self.resting.is_empty() && !self.waiting.is_empty();
        begins.then(|| std::mem::take(&mut self.waiting))
    }

    /// Some are done with resting.
    pub(super) fn is_ready(&self) -> bool {
        self.resting.iter().any(|(grace, _)| grace.is_over())
    }

    /// Those whose period is over.
    fn ready(&mut self) -> Option<Vec<Run>> {
        let over = self.resting.iter().position(|(grace, _)| grace.is_over())?;
        Some(self.resting.swap_remove(over).1)
    }

    /// All of them: the node is drained.
    pub(super) fn all(&mut self) -> Vec<Run> {
        let resting = std::mem::take(&mut self.resting).into_iter().flat_map(|(_, runs)| runs);
        resting.chain(std::mem::take(&mut self.waiting)).collect()
    }

    /// See [`Image::room_comes`].
    pub(super) fn released(&self) -> u64 {
        self.released
    }
}

/// Adds a run, to its neighbour where that was the last.
pub(super) fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.cluster + last.count == run.cluster && last.punch == run.punch => last.count += run.count,
        _ => runs.push(run),
    }
}

impl Image {
    /// Hands over what is done with resting, and lets the next rest.
    pub(super) async fn reclaim(&self, cx: IoCx<'_>) {
        let _turn = self.reclaiming.at(cx, 0).await;
        loop {
            let Some(runs) = self.meta().reuse.ready() else { break };
            let mut held = Held { image: self, runs };
            for number in 0..held.runs.len() {
                if let Some(run) = held.runs.get(number) {
                    self.punch(cx, *run).await;
                }
            }
            let mut meta = self.meta();
            for run in std::mem::take(&mut held.runs) {
                meta.refs.release(run.cluster, run.count);
            }
            meta.reuse.released += 1;
        }
        let batch = self.meta().reuse.batch();
        if let Some(batch) = batch {
            let grace = cx.grace();
            self.meta().reuse.resting.push((grace, batch));
        }
    }

    /// The file below need not keep these. It may have no use for knowing.
    pub(super) async fn punch(&self, cx: IoCx<'_>, run: Run) {
        if !run.punch {
            return;
        }
        let bits = self.layout.cluster_bits;
        let file = cx.child(self.file);
        let at = ByteRange::new(run.cluster << bits, run.count << bits);
        if let Some(at) = at.and_then(|at| at.intersection(ByteRange::whole(file.size()))) {
            // A discard is a hint.
            let _ = file.discard(at).await;
        }
    }

    /// A file of fixed size has no room left, as it was when so much had been `released`. Waits until there may be some;
    /// `false`: nothing is going to be free.
    ///
    /// The request waits aside, as all do that wait at this node, for those who are at work here or below, which wait for
    /// none of these. So there is no circle. A request below that is parked for another root may take long: who is drained
    /// waits for it no longer than [`HURRIED`].
    pub(super) async fn room_comes(&self, cx: IoCx<'_>, released: u64) -> Result<bool, IoError> {
        self.commit(cx).await?;
        self.reclaim(cx).await;
        let grace = {
            // Whoever is just handing something over does so first.
            let _turn = self.reclaiming.at(cx, 0).await;
            let meta = self.meta();
            if meta.reuse.released != released {
                return Ok(true);
            }
            meta.reuse.resting.first().map(|(grace, _)| grace.clone())
        };
        let Some(grace) = grace else { return Ok(false) };
        let over = cx.aside(async {
            match cx.unless_hurried(grace.over()).await {
                Some(()) => true,
                None => within(cx.local(), HURRIED, grace.over()).await.is_some(),
            }
        });
        let over = over.await;
        self.reclaim(cx).await;
        Ok(over)
    }
}

/// How long a request that is being drained waits for those that others parked.
const HURRIED: Duration = Duration::from_secs(1);

/// Clusters that go back to where they came from, unless they are taken out of this.
struct Held<'a> {
    image: &'a Image,
    runs: Vec<Run>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.runs.is_empty() {
            self.image.meta().reuse.waiting.append(&mut self.runs);
        }
    }
}

/// A set of clusters.
#[derive(Default)]
pub(super) struct Clusters(BTreeMap<u64, u64>);

impl Clusters {
    /// Adds clusters that are not in it.
    pub(super) fn insert(&mut self, mut cluster: u64, mut count: u64) {
        if let Some(next) = self.0.remove(&(cluster + count)) {
            count += next;
        }
        if let Some((first, before)) = self.around(cluster.saturating_sub(1)) {
            (cluster, count) = (first, before + count);
        }
        self.0.insert(cluster, count);
    }

    /// Takes out those of the range that are in it.
    pub(super) fn remove(&mut self, cluster: u64, count: u64) {
        let end = cluster + count;
        let mut hit: Vec<(u64, u64)> = self.0.range(cluster..end).map(|(first, count)| (*first, *count)).collect();
        hit.extend(self.around(cluster).filter(|(first, _)| *first < cluster));
        for (first, count) in hit {
            self.0.remove(&first);
            for (from, to) in [(first, cluster), (end, first + count)] {
                if from < to {
                    self.0.insert(from, to - from);
                }
            }
        }
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.around(cluster).is_some()
    }

    /// The run that a cluster is in.
    fn around(&self, cluster: u64) -> Option<(u64, u64)> {
        let (first, count) = self.0.range(..=cluster).next_back()?;
        (cluster < first + count).then_some((*first, *count))
    }

    /// The lowest of the runs that have so many; else, unless it has to have all of them, the lowest. The search for a long one
    /// is short.
    pub(super) fn find(&self, wanted: u64, whole: bool) -> Option<(u64, u64)> {
        let all = || self.0.iter().map(|(first, count)| (*first, *count));
        let looked_at = if whole { usize::MAX } else { LOOKED_AT };
        let long = all().take(looked_at).find(|(_, count)| *count >= wanted);
        long.or_else(|| all().next().filter(|_| !whole))
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Runs that are looked at for one that is long enough.
const LOOKED_AT: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::grace::Share;

    fn run(cluster: u64, count: u64) -> Run {
        Run { cluster, count, punch: true }
    }

    #[test]
    fn one_batch_rests_at_a_time() {
        let gate = crate::graph::gate::Gate::new(());
        let lane = gate.attach();
        gate.enter(&lane, 1).unwrap();
        let mut reuse = Reuse::default();
        let mut inside: Vec<Share> = Vec::new();
        let begin = |reuse: &mut Reuse, inside: &mut Vec<Share>| {
            let batch = reuse.batch()?;
            let grace = Grace::begin([(&*lane, ())].into_iter(), |(), share| inside.push(share));
            reuse.resting.push((grace, batch));
            Some(())
        };
        assert_eq!(begin(&mut reuse, &mut inside), None, "nothing is free");
        reuse.rest(run(3, 1));
        reuse.rest(run(4, 2));
        assert_eq!(begin(&mut reuse, &mut inside), Some(()));
        reuse.rest(run(9, 1));
        assert_eq!(begin(&mut reuse, &mut inside), None, "one at a time");
        assert!(!reuse.is_ready() && reuse.ready().is_none());
        inside.clear();
        assert!(reuse.is_ready());
        assert_eq!(reuse.ready(), Some(vec![run(3, 3)]));
        assert_eq!(begin(&mut reuse, &mut inside), Some(()));
        reuse.rest(run(20, 1));
        assert_eq!(reuse.ready(), None);
        assert_eq!(reuse.all(), [run(9, 1), run(20, 1)]);
        inside.clear();
        assert!(!reuse.is_ready());
        gate.leave(&lane, 0);
        gate.detach(&lane);
    }

    #[test]
    fn a_set_of_clusters_knows_its_runs() {
        let mut set = Clusters::default();
        for (cluster, count) in [(10, 2), (14, 1), (12, 2), (1, 1), (20, 3)] {
            set.insert(cluster, count);
        }
        assert_eq!(set.0.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(), [(1, 1), (10, 5), (20, 3)]);
        assert!(set.contains(14) && !set.contains(15) && !set.contains(9) && !set.contains(0));
        assert_eq!((set.find(2, false), set.find(6, false), set.find(6, true)), (Some((10, 5)), Some((1, 1)), None));
        set.remove(12, 9);
        assert_eq!(set.0.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(), [(1, 1), (10, 2), (21, 2)]);
        set.remove(10, 1);
        set.remove(22, 1);
        assert_eq!(set.0.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>(), [(1, 1), (11, 1), (21, 1)]);
        set.clear();
        assert_eq!(set.find(1, false), None);
    }
}
