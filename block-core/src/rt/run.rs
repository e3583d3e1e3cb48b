//! The loop: one pass does everything that is ready, once and in a fair order; a thread with nothing to do polls for a
//! learned while and then sleeps in the one system call that also submits.

use super::Local;
use super::driver::Completion;
use super::polling::Awaited;
use super::readiness::Fired;
use super::source::Source;
use super::thread::Message;
use super::token::Token;
use std::rc::Rc;
use std::time::{Duration, Instant};

impl Local {
    /// Runs until `over` says so. It is asked before each pass.
    pub(super) fn run(self: &Rc<Self>, mut over: impl FnMut() -> bool) {
        while !over() {
            if !self.pass() {
                self.idle();
            }
        }
    }

    /// Drops all tasks, and waits for what the kernel still has of ours.
    pub(super) fn finish(self: &Rc<Self>) {
        loop {
            self.tasks.drop_all();
            if self.inflight().count() + self.sources.in_flight() == 0 {
                break;
            }
            if !self.pass() {
                self.sleep_in_kernel();
            }
        }
        self.shared().close();
    }

    /// One round. True where anything happened.
    fn pass(self: &Rc<Self>) -> bool {
        self.now.set(Instant::now());
        self.count(|counters| counters.passes += 1);
        let left_over = self.driver().borrow_mut().pending() > 0;
        let mut worked = self.read_mail();
        worked |= self.expire_timers();
        worked |= self.tasks.any_ready() && self.tasks.run(self.now.get() + TASKS_TIME);
        worked |= self.sources.visit();
        worked |= self.submit_and_reap(left_over, worked);
        self.sources.publish();
        worked
    }

    /// Submits what was started, and takes what has completed.
    ///
    /// Where the device answers at once, answers are there after the submission. Where it does not, the submission is
    /// left to the sleep, which is one system call with it, if the next pass finds nothing to do; every sixteenth is made
    /// here to see whether that has changed.
    fn submit_and_reap(&self, left_over: bool, worked: bool) -> bool {
        let started = self.driver().borrow_mut().pending();
        let lazy = self.lazy.get();
        let overdue = left_over && worked;
        if lazy > 0 && started > 0 && !overdue {
            self.lazy.set(lazy - u32::from(!left_over));
            return self.reap() > 0;
        }
        self.driver().borrow_mut().flush();
        let reaped = self.reap();
        if lazy == 0 && reaped < started {
            self.lazy.set(LAZY);
        }
        reaped > 0
    }

    /// What was there when the pass began: senders cannot keep the thread here.
    fn read_mail(self: &Rc<Self>) -> bool {
        let mut any = false;
        for _ in 0..MAIL_BATCH {
            let Some(message) = self.shared().take() else { break };
            any = true;
            match message {
                Message::Call(call) => call(self),
                Message::Wake(task) => self.tasks.push(task),
                Message::Completed { token, result } => self.complete_one(token, result),
                Message::Stop => self.stopping.set(true),
            }
        }
        any
    }

    fn expire_timers(&self) -> bool {
        let mut any = false;
        loop {
            let expired = self.timers().borrow_mut().expire(self.now.get());
            let Some(waker) = expired else { return any };
            any = true;
            waker.wake();
        }
    }

    /// Takes all completions. Those of sources are only noted; `publish` follows.
    fn reap(&self) -> usize {
        let mut reaped = self.reaped.take();
        self.driver().borrow_mut().reap(&mut reaped);
        let count = reaped.len();
        self.hand_out(&reaped);
        reaped.clear();
        *self.reaped.borrow_mut() = reaped;
        count
    }

    fn hand_out(&self, completions: &[Completion]) {
        // Completions come in runs of one source: it is looked up, and settled with, once a run.
        let mut current: Option<Run> = None;
        for done in completions {
            let token = Token::unpack(done.token);
            let Token::Direct { source, slot } = token else {
                self.hand_out_rare(token, done);
                continue;
            };
            if current.as_ref().is_none_or(|run| run.key != source) {
                self.settle(current.take());
                current = Some(Run { key: source, source: self.sources.owner(source), count: 0 });
            }
            if let Some(run) = &mut current {
                run.source.complete(slot, done.result);
                run.count += 1;
            }
        }
        self.settle(current);
    }

    fn settle(&self, run: Option<Run>) {
        if let Some(run) = run {
            self.sources.completed(run.key, run.count);
        }
    }

    fn hand_out_rare(&self, token: Token, done: &Completion) {
        match token {
            Token::Poll(slot) => match self.watches().complete(self, slot, done.result, done.more) {
                Fired::Nothing | Fired::Wake(None) => {}
                Fired::Wake(Some(waker)) => waker.wake(),
                Fired::Kick { source, tag } => self.sources.kick(source, tag),
            },
            // The mailbox is read in every pass.
            Token::Mail | Token::Cancel => {}
            Token::Op(_) | Token::Direct { .. } => self.complete_one(token, done.result),
        }
    }

    /// A completion of an operation, from the ring or from a helper.
    fn complete_one(&self, token: Token, result: i32) {
        match token {
            Token::Op(slot) => self.inflight().complete(slot, result),
            Token::Direct { source, slot } => {
                self.sources.owner(source).complete(slot, result);
                self.sources.completed(source, 1);
            }
            Token::Poll(_) | Token::Mail | Token::Cancel => unreachable!("helpers run operations, not watches"),
        }
    }

    /// Nothing is ready: poll for as long as that has paid off, then sleep.
    fn idle(&self) {
        let awaited = Awaited::of(self.sources.in_flight() + self.inflight().count());
        // Without a hot source and without operations there is nothing that a poll could see before a sleep would.
        let learns = self.sources.any_hot();
        self.polling.borrow_mut().served(self.requests.take());
        let budget = if learns { self.polling.borrow().budget(awaited) } else { 0 };
        let began = self.now.get();
        if budget > 0 {
            self.driver().borrow_mut().flush();
        }
        if budget > 0 && self.spin(began + Duration::from_nanos(budget)) {
            self.count(|counters| counters.polls_hit += 1);
            return self.learn(awaited, began, budget);
        }
        // Whoever is asked may have woken a task.
        if !self.sources.rest() || self.tasks.any_ready() {
            return;
        }
        self.count(|counters| counters.polls_missed += u64::from(budget > 0));
        self.sleep_in_kernel();
        if learns {
            self.learn(awaited, began, budget);
        }
    }

    fn learn(&self, awaited: Awaited, began: Instant, polled_ns: u64) {
        let gap_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.polling.borrow_mut().waited(awaited, gap_ns, polled_ns);
    }

    /// Looks at memory until something happens. False where time ran out.
    fn spin(&self, deadline: Instant) -> bool {
        let deadline = self.timers().borrow_mut().next().map_or(deadline, |next| next.min(deadline));
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                if self.sources.any_work() || !self.shared().is_empty() || self.driver().borrow_mut().has_completions()
                {
                    return true;
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= deadline {
                return false;
            }
        }
    }

    /// The one wait. Returns at once where a message has come.
    fn sleep_in_kernel(&self) {
        let next = self.timers().borrow_mut().next();
        if !self.shared().prepare_sleep() {
            return;
        }
        let timeout = next.map(|next| next.saturating_duration_since(Instant::now()));
        self.count(|counters| counters.sleeps += 1);
        self.driver().borrow_mut().wait(timeout);
        self.shared().woke();
    }
}

/// Completions of one source, one after another.
struct Run {
    key: u32,
    source: Rc<dyn Source>,
    count: u32,
}

const LAZY: u32 = 15;
/// What tasks have of one pass; then queues and completions have their turn, and the other tasks go on in the next one.
const TASKS_TIME: Duration = Duration::from_millis(1);
const MAIL_BATCH: usize = 1024;
const LOOKS_PER_CLOCK: usize = 8;
