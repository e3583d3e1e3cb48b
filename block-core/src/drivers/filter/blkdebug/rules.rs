//! What an event sets off, and which request fails: decided here, asked from the requests.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::options::{InjectErrorOptions, IoType, SetStateOptions};
use crate::base::{ByteRange, Error, IoError, Result, SECTOR};
use crate::graph::DebugEvent;

/// The largest errno of Linux.
const LAST_ERRNO: i64 = 4095;
/// The state that a node begins in.
const FIRST_STATE: i64 = 1;

/// A rule as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    event: DebugEvent,
    /// `None`: any.
    state: Option<i64>,
    action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Inject(Inject),
    SetState(i64),
}

/// Which requests fail, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inject {
    /// `None`: all but the question where data is.
    kind: Option<IoType>,
    /// The first byte of a sector; `None`: anywhere.
    byte: Option<u64>,
    /// `None`: the request passes.
    error: Option<IoError>,
    once: bool,
    immediately: bool,
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Injected {
    pub(super) error: IoError,
    /// Before it has waited for anything.
    pub(super) immediately: bool,
}

impl Rule {
    pub(super) fn injecting(options: &InjectErrorOptions) -> Result<Self> {
        let inject = Inject {
            kind: options.iotype,
            byte: options.sector.map_or(Ok(None), sector)?,
            error: error(options.errno.unwrap_or(libc::EIO.into()))?,
            once: options.once.unwrap_or(false),
            immediately: options.immediately.unwrap_or(false),
        };
        Ok(Self { event: options.event, state: state(options.state), action: Action::Inject(inject) })
    }

    pub(super) fn setting(options: &SetStateOptions) -> Self {
        Self { event: options.event, state: state(options.state), action: Action::SetState(options.new_state) }
    }
}

fn state(state: Option<i64>) -> Option<i64> {
    state.filter(|state| *state != 0)
}

fn sector(sector: i64) -> Result<Option<u64>> {
    if sector == -1 {
        return Ok(None);
    }
    let byte = u64::try_from(sector).ok().and_then(|sector| sector.checked_mul(SECTOR));
    byte.map(Some).ok_or_else(|| out_of_range(sector, "sector"))
}

fn error(errno: i64) -> Result<Option<IoError>> {
    match i32::try_from(errno) {
        Ok(0) => Ok(None),
        Ok(small) if (1..=LAST_ERRNO).contains(&errno) => Ok(Some(IoError::from_errno(small))),
        Ok(_) | Err(_) => Err(out_of_range(errno, "errno")),
    }
}

fn out_of_range(value: i64, name: &str) -> Error {
    Error::new(format!("Value '{value}' is out of range for parameter '{name}'"))
}

/// All rules of a node, and how far they have come.
pub(super) struct Rules {
    script: Mutex<Script>,
    is_empty: bool,
    /// Some rule makes requests fail now.
    in_force: AtomicBool,
}

impl Rules {
    pub(super) fn new(rules: Vec<Rule>) -> Self {
        let is_empty = rules.is_empty();
        Self { script: Mutex::new(Script::new(rules)), is_empty, in_force: AtomicBool::new(false) }
    }

    /// There never was one.
    pub(super) fn is_empty(&self) -> bool {
        self.is_empty
    }

    pub(super) fn hear(&self, event: DebugEvent) {
        if !self.is_empty {
            self.with(|script| script.hear(event));
        }
    }

    /// How a request fails, if it does.
    pub(super) fn injected(&self, kind: IoType, at: ByteRange) -> Option<Injected> {
        if !self.in_force.load(Relaxed) {
            return None;
        }
        self.with(|script| script.injected(kind, at))
    }

    fn with<T>(&self, step: impl FnOnce(&mut Script) -> T) -> T {
        let mut script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
        let value = step(&mut script);
        self.in_force.store(!script.in_force.is_empty(), Relaxed);
        value
    }
}

/// The rules as a state machine.
struct Script {
    state: i64,
    rules: Vec<Rule>,
    /// What the last event that set off injections set off; the first that fits a request decides.
    in_force: Vec<usize>,
    /// Rules that had their one request.
    spent: Vec<bool>,
}

impl Script {
    fn new(rules: Vec<Rule>) -> Self {
        Self { state: FIRST_STATE, spent: vec![false; rules.len()], rules, in_force: Vec::new() }
    }

    fn hear(&mut self, event: DebugEvent) {
        let now = self.state;
        let set_off = |rule: &Rule| rule.event == event && rule.state.is_none_or(|state| state == now);
        let mut injecting = Vec::new();
        let mut next = None;
        for (number, rule) in self.rules.iter().enumerate().filter(|(_, rule)| set_off(rule)) {
            match rule.action {
                Action::Inject(_) if self.spent[number] => {}
                Action::Inject(_) => injecting.push(number),
                Action::SetState(state) => next = next.or(Some(state)),
            }
        }
        if !injecting.is_empty() {
            self.in_force = injecting;
        }
        self.state = next.unwrap_or(now);
    }

    fn injected(&mut self, kind: IoType, at: ByteRange) -> Option<Injected> {
        let fitting = self.in_force.iter().enumerate().find_map(|(place, number)| match self.rules[*number].action {
            Action::Inject(inject) if inject.fits(kind, at) => Some((place, *number, inject)),
            Action::Inject(_) | Action::SetState(_) => None,
        });
        let (place, number, inject) = fitting?;
        let error = inject.error?;
        if inject.once {
            self.in_force.remove(place);
            self.spent[number] = true;
        }
        Some(Injected { error, immediately: inject.immediately })
    }
}

impl Inject {
    fn fits(self, kind: IoType, at: ByteRange) -> bool {
        let of_kind = self.kind.map_or(kind != IoType::BlockStatus, |only| only == kind);
        of_kind && self.byte.is_none_or(|byte| at.start() <= byte && byte < at.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DebugEvent::{Pwritev, PwritevDone, PwritevZero};

    fn inject(event: DebugEvent, state: i64, errno: i64, once: bool) -> Rule {
        let (iotype, sector, immediately) = (None, None, None);
        let options = InjectErrorOptions {
            event,
            state: Some(state),
            iotype,
            errno: Some(errno),
            sector,
            once: Some(once),
            immediately,
        };
        Rule::injecting(&options).unwrap()
    }

    fn set(event: DebugEvent, state: i64, new_state: i64) -> Rule {
        Rule::setting(&SetStateOptions { event, state: Some(state), new_state })
    }

    fn errno(rules: &Rules) -> Option<i32> {
        let whole = ByteRange::whole(1 << 20);
        rules.injected(IoType::Read, whole).map(|injected| injected.error.errno())
    }

    #[test]
    fn a_rule_stays_in_force_until_another_event_sets_one_off() {
        let rules = Rules::new(vec![inject(Pwritev, 0, 28, false), inject(PwritevZero, 0, 13, false)]);
        assert_eq!(errno(&rules), None);
        rules.hear(Pwritev);
        rules.hear(PwritevDone);
        assert_eq!((errno(&rules), errno(&rules)), (Some(28), Some(28)));
        rules.hear(PwritevZero);
        assert_eq!(errno(&rules), Some(13));
    }

    #[test]
    fn the_first_rule_decides_and_is_spent_first() {
        let rules = Rules::new(vec![inject(Pwritev, 0, 28, true), inject(Pwritev, 0, 13, true)]);
        rules.hear(Pwritev);
        assert_eq!(errno(&rules), Some(28));
        rules.hear(Pwritev);
        assert_eq!((errno(&rules), errno(&rules)), (Some(13), None));
        rules.hear(Pwritev);
        assert_eq!(errno(&rules), None, "both are spent");
    }

    #[test]
    fn a_rule_of_errno_0_shields_from_later_ones() {
        let rules = Rules::new(vec![inject(Pwritev, 0, 0, false), inject(Pwritev, 0, 13, false)]);
        rules.hear(Pwritev);
        assert_eq!(errno(&rules), None);
    }

    #[test]
    fn states_lead_on_only_after_the_event() {
        let rules = vec![set(Pwritev, 1, 2), set(Pwritev, 0, 3), inject(Pwritev, 2, 28, false)];
        let rules = Rules::new(rules);
        rules.hear(Pwritev);
        assert_eq!(errno(&rules), None, "the state was 1 when the event came");
        rules.hear(Pwritev);
        assert_eq!(errno(&rules), Some(28));
        assert_eq!(rules.script.lock().unwrap().state, 3);
    }

    #[test]
    fn a_sector_is_looked_for_in_the_request() {
        let options = InjectErrorOptions {
            event: DebugEvent::None,
            state: None,
            iotype: Some(IoType::Read),
            errno: None,
            sector: Some(2),
            once: None,
            immediately: None,
        };
        let rules = Rules::new(vec![Rule::injecting(&options).unwrap()]);
        rules.hear(DebugEvent::None);
        let hit = |kind, start, len| rules.injected(kind, ByteRange::new(start, len).unwrap()).is_some();
        assert!(hit(IoType::Read, 0, 1536) && hit(IoType::Read, 1024, 1));
        assert!(!hit(IoType::Read, 0, 1024) && !hit(IoType::Read, 1025, 512) && !hit(IoType::Write, 0, 4096));
        assert!(!hit(IoType::Flush, 0, 0));
    }

    #[test]
    fn numbers_that_mean_nothing_are_refused() {
        for wrong in [-1, i64::MIN, 4096, i64::MAX] {
            assert!(error(wrong).is_err(), "{wrong}");
        }
        for wrong in [-2, i64::MIN, i64::MAX] {
            assert!(sector(wrong).is_err(), "{wrong}");
        }
    }
}
