//! The direct path: the same checks as for any request, and an answer from memory instead of a future.

use crate::graph::{Child, DetectZeroes, Direct, DirectPlan, DirectRequest, OpKind, PermSet, Settled};

impl Child<'_> {
    /// A ring entry for the request, or `None` where it has to take the async path, which also finds the right error.
    #[inline]
    pub fn direct(self, request: DirectRequest) -> Option<DirectPlan> {
        let (options, geometry) = (self.options(), self.geometry());
        let limits = geometry.limits;
        let wanted = if request.write { PermSet::WRITE } else { PermSet::NONE };
        self.check(request.at, wanted).ok()?;
        let fits = request.at.is_aligned(u64::from(limits.request_alignment))
            && request.memory_bits & (limits.memory_alignment as usize - 1) == 0
            && request.at.len() <= limits.max_transfer;
        if !fits || request.at.is_empty() {
            return None;
        }
        let fua = request.fua && !options.no_flush;
        if request.write && (options.detect_zeroes != DetectZeroes::Off || (fua && !limits.fua)) {
            return None;
        }
        let placed = self.placed();
        let mut plan = placed.body.direct(self.cx(), DirectRequest { fua, ..request })?;
        plan.trail.push(self.slot())?;
        if request.write {
            self.owes(&mut plan, request)?;
            placed.shared.writing_up_to(request.at.end());
            self.counters().wrote_up_to(request.at.end());
        }
        Some(plan)
    }

    /// What a write owes the node for the time that its ring entry takes. Reads are kept apart from nobody: a
    /// read-modify-write gives their sectors back as they were.
    #[inline]
    fn owes(self, plan: &mut DirectPlan, request: DirectRequest) -> Option<()> {
        let (apart, recorded) = (self.placed().tracks(), !self.placed().bitmaps.is_empty());
        if (apart || recorded) && !matches!(plan.answer, Direct::Ring(_)) {
            return None;
        }
        if apart {
            plan.trail.keep_apart();
        }
        // A bitmap is marked when a write is over, so that who copies what is dirty misses none.
        if recorded { plan.trail.record(request.at.start()) } else { Some(()) }
    }

    /// A ring entry of [`Child::direct`] ended with `result` (bytes, or a negative errno) instead of the full length.
    #[cold]
    pub fn settle(self, request: DirectRequest, result: i32) -> Settled {
        let settled = self.placed().body.settle(self.cx(), request, result);
        if let Settled::Failed(error) = settled {
            self.counters().failed(if request.write { OpKind::Write } else { OpKind::Read });
            self.tell_failure(request.write, error);
        }
        settled
    }
}
