//! The vote of a quorum, without any I/O: which of several answers counts.

use crate::base::IoError;
use crate::pipeline::{Content, Status};

/// What voters said, in the order in which it first came up.
pub(super) struct Ballot<V, T>(Vec<Version<V, T>>);

/// One of the things that were said, and who said it.
pub(super) struct Version<V, T> {
    pub(super) says: T,
    /// In the order of their votes.
    pub(super) voters: Vec<V>,
}

impl<V: Copy, T> Ballot<V, T> {
    /// Counts votes: the voter, and what it says.
    pub(super) fn of(votes: impl IntoIterator<Item = (V, T)>, same: impl Fn(&T, &T) -> bool) -> Self {
        let mut versions: Vec<Version<V, T>> = Vec::new();
        for (voter, says) in votes {
            match versions.iter_mut().find(|version| same(&version.says, &says)) {
                Some(version) => version.voters.push(voter),
                None => versions.push(Version { says, voters: vec![voter] }),
            }
        }
        Self(versions)
    }

    /// All said the same, or nobody said anything.
    pub(super) fn is_unanimous(&self) -> bool {
        self.0.len() <= 1
    }

    /// What most say; of two with as many, the one that came up later, as with QEMU.
    pub(super) fn winner(&self) -> Option<&Version<V, T>> {
        self.0.iter().max_by_key(|version| version.voters.len())
    }

    /// Who did not say what `winner` says.
    pub(super) fn against<'a>(&'a self, winner: &'a Version<V, T>) -> impl Iterator<Item = V> + 'a {
        let others = self.0.iter().filter(|version| !std::ptr::eq(*version, winner));
        others.flat_map(|version| version.voters.iter().copied())
    }
}

/// How a request ends that `threshold` copies have to get through: well, or with the error that most of the others had.
pub(super) fn outcome(results: &[Result<(), IoError>], threshold: usize) -> Result<(), IoError> {
    let errors = results.iter().enumerate().filter_map(|(copy, result)| Some((copy, result.err()?)));
    let ballot = Ballot::of(errors, |one, other| one == other);
    let good = results.iter().filter(|result| result.is_ok()).count();
    match ballot.winner() {
        Some(error) if good < threshold => Err(error.says),
        Some(_) | None => Ok(()),
    }
}

/// For how many of `len` bytes all copies agree, and whether they agree on zeroes. A copy that does not know may have
/// data everywhere.
pub(super) fn agreed(statuses: &[Result<Status, IoError>], len: u64) -> (u64, bool) {
    let parts = statuses.iter().map(|status| match status {
        Ok(Status { len, content: Content::Zero | Content::Absent, .. }) => (*len, true),
        Ok(Status { len, content: Content::Data | Content::Encoded, .. }) => (*len, false),
        Err(_) => (len, false),
    });
    let (zeroes, data): (Vec<_>, Vec<_>) = parts.partition(|(_, is_zero)| *is_zero);
    match data.iter().max() {
        Some(longest) => *longest,
        None => zeroes.iter().min().copied().unwrap_or((len, false)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn winner(votes: &[u8]) -> (u8, Vec<usize>, Vec<usize>) {
        let ballot = Ballot::of(votes.iter().copied().enumerate(), |one, other| one == other);
        let winner = ballot.winner().unwrap();
        (winner.says, winner.voters.clone(), ballot.against(winner).collect())
    }

    #[test]
    fn most_votes_win_and_of_equals_the_later() {
        assert_eq!(winner(&[7, 8, 7]), (7, vec![0, 2], vec![1]));
        assert_eq!(winner(&[7, 8, 8, 7]), (8, vec![1, 2], vec![0, 3]));
        assert_eq!(winner(&[7, 8, 9]), (9, vec![2], vec![0, 1]));
        assert_eq!(winner(&[7]), (7, vec![0], vec![]));
        let nobody = Ballot::of(Vec::<(usize, u8)>::new(), |one, other| one == other);
        assert!(nobody.winner().is_none() && nobody.is_unanimous());
    }

    /// As `qemu-storage-daemon` 10.0.2 answers with three blkdebug children.
    #[test]
    fn the_error_that_most_had_is_told() {
        let (io, full, memory) = (Err(IoError::Os(5)), Err(IoError::NoSpace), Err(IoError::NoMemory));
        assert_eq!(outcome(&[Ok(()), full, Ok(())], 2), Ok(()));
        assert_eq!(outcome(&[Ok(()), full, io], 2), io);
        assert_eq!(outcome(&[io, full, full], 2), full);
        assert_eq!(outcome(&[full, io, io], 2), io);
        assert_eq!(outcome(&[io, full, memory], 2), memory);
        assert_eq!(outcome(&[Ok(()), Ok(()), full], 3), full);
    }

    #[test]
    fn only_what_all_call_zero_is_zero() {
        let status = |len, content| Ok(Status { len, content, depth: 0 });
        let (zero, absent, data) =
            (status(512, Content::Zero), status(1024, Content::Absent), status(256, Content::Data));
        assert_eq!(agreed(&[zero, absent], 4096), (512, true));
        assert_eq!(agreed(&[zero, data], 4096), (256, false));
        assert_eq!(agreed(&[data, status(2048, Content::Encoded), zero], 4096), (2048, false));
        assert_eq!(agreed(&[zero, Err(IoError::Os(5))], 4096), (4096, false));
    }
}
