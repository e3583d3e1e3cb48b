//! What systemd is told: ready, stopping, what we do, and that we live. Without systemd all of it is nothing.

use std::rc::Rc;
use std::time::Duration;

use block_core::rt::Local;
use sd_notify::NotifyState;

/// Everything is set up.
pub(crate) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The end has begun.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: draining exports")]);
}

/// Says that we live as often as the service manager wants to hear it: a control thread that is stuck falls silent.
pub(crate) fn keep_watchdog(local: &Rc<Local>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let task = {
        let local = local.clone();
        async move { tell_we_live(&local, limit / 2).await }
    };
    local.spawn(task);
}

async fn tell_we_live(local: &Local, interval: Duration) {
    loop {
        tell(&[NotifyState::Watchdog]);
        local.sleep(interval).await;
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!("could not notify the service manager: {error}");
    }
}
