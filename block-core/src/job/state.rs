//! What a job may become, and what may be said to it when: data alone.
//!
//! Source: QEMU's QMP reference, `JobStatus` and `JobVerb`.

use std::fmt;

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It has an id and nothing else.
    Undefined,
    /// It is there and has not begun.
    Created,
    /// It works.
    Running,
    /// It stands still until it is resumed.
    Paused,
    /// It has nothing left to do but to keep up, until it is told to complete.
    Ready,
    /// It was ready and stands still.
    Standby,
    /// Its work is done; others of its transaction are not.
    Waiting,
    /// It can be finalized.
    Pending,
    /// It failed or was cancelled, and is undoing its work.
    Aborting,
    /// It is over, and is remembered until somebody dismisses it.
    Concluded,
    /// It is gone.
    Null,
}

/// What can be said to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// End without a result.
    Cancel,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Come to the end that you are ready for.
    Complete,
    /// Make your result count.
    Finalize,
    /// Be forgotten.
    Dismiss,
}

impl Status {
    /// True where a job in this state may come next to be in `next`.
    pub fn may_become(self, next: Self) -> bool {
        let nexts: &[Self] = match self {
            Self::Undefined => &[Self::Created],
            Self::Created => &[Self::Running, Self::Aborting, Self::Null],
            Self::Running => &[Self::Paused, Self::Ready, Self::Waiting, Self::Aborting],
            Self::Paused => &[Self::Running],
            Self::Ready => &[Self::Standby, Self::Waiting, Self::Aborting],
            Self::Standby => &[Self::Ready],
            Self::Waiting => &[Self::Pending, Self::Aborting],
            Self::Pending => &[Self::Aborting, Self::Concluded],
            Self::Aborting => &[Self::Aborting, Self::Concluded],
            Self::Concluded => &[Self::Null],
            Self::Null => &[],
        };
        nexts.contains(&next)
    }

    /// True where a job in this state listens to `verb`.
    pub fn takes(self, verb: Verb) -> bool {
        let works = [Self::Created, Self::Running, Self::Paused, Self::Ready, Self::Standby].contains(&self);
        match verb {
            Verb::Cancel => works || [Self::Waiting, Self::Pending].contains(&self),
            Verb::Pause | Verb::Resume => works,
            Verb::Complete => [Self::Ready, Self::Standby].contains(&self),
            Verb::Finalize => self == Self::Pending,
            Verb::Dismiss => self == Self::Concluded,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        })
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Status; 11] = [
        Status::Undefined,
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Ready,
        Status::Standby,
        Status::Waiting,
        Status::Pending,
        Status::Aborting,
        Status::Concluded,
        Status::Null,
    ];

    #[test]
    fn every_life_has_an_end_and_only_one() {
        let ends: Vec<_> =
            ALL.into_iter().filter(|status| !ALL.into_iter().any(|next| status.may_become(next))).collect();
        assert_eq!(ends, [Status::Null]);
        assert!(!ALL.into_iter().any(|status| status.may_become(Status::Undefined)));
        // What is over is only forgotten.
        assert!(ALL.into_iter().all(|next| Status::Concluded.may_become(next) == (next == Status::Null)));
    }

    #[test]
    fn what_is_over_takes_no_order_but_to_be_forgotten() {
        for verb in [Verb::Cancel, Verb::Pause, Verb::Resume, Verb::Complete, Verb::Finalize] {
            assert!(!Status::Concluded.takes(verb) && !Status::Aborting.takes(verb) && !Status::Null.takes(verb));
        }
        assert!(ALL.into_iter().all(|status| status.takes(Verb::Dismiss) == (status == Status::Concluded)));
    }
}
