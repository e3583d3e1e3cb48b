//! Faults that the models must catch: under `cfg(loom)` and `cfg(shuttle)` the one named in `TRELLIS_CANARY` is in
//! force, in any other build none is, and the compiler removes the question.

/// True where the known-bad variant `name` is to be run.
#[cfg(any(loom, shuttle))]
pub(crate) fn canary(name: &str) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    CHOSEN.get_or_init(|| std::env::var("TRELLIS_CANARY").ok()).as_deref() == Some(name)
}

/// True where the known-bad variant `name` is to be run.
#[cfg(not(any(loom, shuttle)))]
#[inline(always)]
pub(crate) const fn canary(_name: &str) -> bool {
    false
}
