//! What an edge uses and what it lets others use. Pure values; who may change them is `edit.rs`.
//!
//! The bits and their order are those that QEMU's byte-range file locks use, so that either program refuses the
//! other's image.

use std::fmt;

/// A set of permissions on a node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PermSet(u8);

impl PermSet {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Reads see data that no other user is half-way through changing.
    pub const CONSISTENT_READ: Self = Self(1);
    /// Writes that change what a reader sees.
    pub const WRITE: Self = Self(2);
    /// Writes that leave what a reader sees as it was (copy-on-read, commit).
    pub const WRITE_UNCHANGED: Self = Self(4);
    /// Changes of the size.
    pub const RESIZE: Self = Self(8);
    /// Everything.
    pub const ALL: Self = Self(15);

    /// All of `other` is in here.
    #[inline]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in here and not in `other`.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// True where nothing is in here.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The single permissions in here with their bit numbers 0 to 3 (the byte offsets of QEMU's file locks).
    pub fn bits(self) -> impl Iterator<Item = (u8, Self)> {
        (0..4).map(|bit| (bit, Self(1 << bit))).filter(move |(_, one)| self.contains(*one))
    }

    fn name(self) -> &'static str {
        match self.0 {
            1 => "consistent read",
            2 => "write",
            4 => "write unchanged",
            8 => "resize",
            _ => "several permissions",
        }
    }
}

impl std::ops::BitOr for PermSet {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitAnd for PermSet {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Display for PermSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.bits().map(|(_, one)| one.name()).collect();
        f.write_str(&names.join(", "))
    }
}

impl fmt::Debug for PermSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

/// What one user of a node uses, and what it lets the others use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Perms {
    /// What it does.
    pub uses: PermSet,
    /// What it bears from others.
    pub shares: PermSet,
}

impl Perms {
    /// Uses nothing and bears everything: a node that nobody uses.
    pub const IDLE: Self = Self { uses: PermSet::NONE, shares: PermSet::ALL };

    /// Both users seen as one: uses are added, tolerance is what both bear.
    pub fn and(self, other: Self) -> Self {
        Self { uses: self.uses | other.uses, shares: self.shares & other.shares }
    }

    /// What `self` uses although `other` does not bear it.
    pub fn refused_by(self, other: Self) -> PermSet {
        self.uses.without(other.shares)
    }
}

/// What a child is to its parent; decides the default rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The parent passes requests on as they are.
    Filtered,
    /// Guest data lives there.
    Data,
    /// The parent's own tables live there, and perhaps data too.
    Metadata,
    /// Data that the parent has not got yet (a backing file).
    Cow,
    /// The parent refers to it by name and does no I/O through it.
    Reference,
}

impl Role {
    /// What a parent needs of a child in this role, if its own users need `above`.
    /// `writable`: the parent node may write (its options after the pending change).
    pub fn child_perms(self, above: Perms, writable: bool) -> Perms {
        match self {
            Self::Filtered => above,
            Self::Data => data_perms(above),
            Self::Metadata => metadata_perms(above, writable),
            Self::Cow => cow_perms(above),
            Self::Reference => Perms::IDLE,
        }
    }

    /// What becomes of that while the parent is inactive: it changes nothing, and those of its children that are no more
    /// than its storage may be written and resized by others (another process may be working with the image).
    pub(crate) fn of_inactive(self, perms: Perms) -> Perms {
        let bears = match self {
            Self::Data | Self::Metadata | Self::Cow => PermSet::WRITE | PermSet::RESIZE,
            Self::Filtered | Self::Reference => PermSet::NONE,
        };
        Perms { uses: perms.uses & PermSet::CONSISTENT_READ, shares: perms.shares | bears }
    }
}

fn data_perms(above: Perms) -> Perms {
    let mut uses = above.uses;
    if uses.contains(PermSet::WRITE_UNCHANGED) {
        uses = uses | PermSet::WRITE;
    }
    // A write may have to grow the file that holds the data.
    if uses.contains(PermSet::WRITE) {
        uses = uses | PermSet::RESIZE;
    }
    Perms { uses, shares: above.shares.without(PermSet::RESIZE) }
}

fn metadata_perms(above: Perms, writable: bool) -> Perms {
    let own = if writable { PermSet::WRITE | PermSet::RESIZE } else { PermSet::NONE };
    Perms {
        uses: above.uses | PermSet::CONSISTENT_READ | own,
        shares: above.shares.without(PermSet::WRITE | PermSet::RESIZE),
    }
}

fn cow_perms(above: Perms) -> Perms {
    let mut shares = PermSet::CONSISTENT_READ | PermSet::WRITE_UNCHANGED;
    if above.shares.contains(PermSet::WRITE) {
        shares = shares | PermSet::WRITE | PermSet::RESIZE;
    }
    Perms { uses: above.uses & PermSet::CONSISTENT_READ, shares }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_image_may_grow_its_file_and_bears_no_other_resize() {
        let above = Perms { uses: PermSet::WRITE, shares: PermSet::ALL };
        let below = Role::Data.child_perms(above, true);
        assert!(below.uses.contains(PermSet::WRITE | PermSet::RESIZE));
        assert!(!below.shares.contains(PermSet::RESIZE));
        assert!(below.shares.contains(PermSet::WRITE));
    }

    #[test]
    fn a_backing_file_is_only_read() {
        let above = Perms { uses: PermSet::ALL, shares: PermSet::CONSISTENT_READ };
        let below = Role::Cow.child_perms(above, true);
        assert_eq!(below.uses, PermSet::CONSISTENT_READ);
        assert!(!below.shares.contains(PermSet::WRITE));
    }

    #[test]
    fn tables_are_written_even_if_nobody_above_writes() {
        let below = Role::Metadata.child_perms(Perms::IDLE, true);
        assert!(below.uses.contains(PermSet::WRITE) && !below.shares.contains(PermSet::WRITE));
        let read_only = Role::Metadata.child_perms(Perms::IDLE, false);
        assert!(!read_only.uses.contains(PermSet::WRITE));
    }

    #[test]
    fn a_filter_asks_for_what_is_asked_of_it() {
        let above = Perms { uses: PermSet::WRITE | PermSet::RESIZE, shares: PermSet::CONSISTENT_READ };
        assert_eq!(Role::Filtered.child_perms(above, true), above);
        assert_eq!(Role::Filtered.child_perms(above, false), above);
        assert_eq!(Role::Reference.child_perms(above, true), Perms::IDLE);
    }

    #[test]
    fn data_that_is_rewritten_is_written() {
        let above = Perms { uses: PermSet::WRITE_UNCHANGED, shares: PermSet::ALL };
        let below = Role::Data.child_perms(above, true);
        assert!(below.uses.contains(PermSet::WRITE | PermSet::WRITE_UNCHANGED | PermSet::RESIZE));
    }

    #[test]
    fn tables_bear_nobody_who_moves_them() {
        let above = Perms { uses: PermSet::WRITE, shares: PermSet::ALL };
        let below = Role::Metadata.child_perms(above, true);
        assert!(below.uses.contains(PermSet::CONSISTENT_READ | PermSet::WRITE | PermSet::RESIZE));
        assert_eq!(below.shares, PermSet::CONSISTENT_READ | PermSet::WRITE_UNCHANGED);
    }

    #[test]
    fn a_backing_file_may_be_written_where_the_overlays_users_bear_it() {
        let above = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL };
        assert_eq!(Role::Cow.child_perms(above, true).shares, PermSet::ALL);
        let strict = Perms { shares: PermSet::ALL.without(PermSet::WRITE), ..above };
        let shares = Role::Cow.child_perms(strict, true).shares;
        assert_eq!(shares, PermSet::CONSISTENT_READ | PermSet::WRITE_UNCHANGED);
    }

    #[test]
    fn who_is_inactive_changes_nothing_and_lets_others_change_its_storage() {
        let above = Perms { uses: PermSet::ALL, shares: PermSet::NONE };
        for role in [Role::Data, Role::Metadata, Role::Cow] {
            let active = role.child_perms(above, true);
            let asleep = role.of_inactive(active);
            assert_eq!(asleep.uses, PermSet::CONSISTENT_READ, "{role:?}");
            assert!(!active.shares.contains(PermSet::WRITE) && !active.shares.contains(PermSet::RESIZE), "{role:?}");
            assert!(asleep.shares.contains(PermSet::WRITE | PermSet::RESIZE), "{role:?}");
        }
        // A filter bears what its own users bear, asleep or not.
        assert_eq!(Role::Filtered.of_inactive(above).shares, PermSet::NONE);
        assert_eq!(Role::Reference.of_inactive(Perms::IDLE), Perms::IDLE);
    }

    #[test]
    fn users_together_use_what_one_uses_and_bear_what_all_bear() {
        let writer = Perms { uses: PermSet::WRITE, shares: PermSet::ALL.without(PermSet::RESIZE) };
        let reader = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::ALL.without(PermSet::WRITE) };
        let both = writer.and(reader);
        assert_eq!(both.uses, PermSet::WRITE | PermSet::CONSISTENT_READ);
        assert_eq!(both.shares, PermSet::CONSISTENT_READ | PermSet::WRITE_UNCHANGED);
    }

    #[test]
    fn a_conflict_names_what_is_refused() {
        let writer = Perms { uses: PermSet::WRITE, shares: PermSet::ALL };
        let guard = Perms { uses: PermSet::CONSISTENT_READ, shares: PermSet::CONSISTENT_READ };
        assert_eq!(writer.refused_by(guard).to_string(), "write");
        assert!(guard.refused_by(writer).is_empty());
    }
}
