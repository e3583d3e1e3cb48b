//! What a client has still to be sent. Bounded whatever it reads and whatever happens: replies hold the next command
//! back, and of events that do not fit the oldest give way.

use std::collections::VecDeque;

/// Bytes on their way to one client.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: VecDeque<u8>,
    events: VecDeque<Waiting>,
    dropped: u64,
}

/// An event that waits until the client reads again.
#[derive(Debug)]
struct Waiting {
    key: Option<String>,
    line: Vec<u8>,
}

impl Outbox {
    /// Adds a reply. There is at most one on top of [`HIGH_MARK`], since the caller then starts no command.
    pub(super) fn reply(&mut self, line: &[u8]) {
        self.bytes.extend(line);
    }

    /// Adds an event. While the client does not read, a later one of the same key replaces an earlier one.
    pub(super) fn event(&mut self, key: Option<String>, line: Vec<u8>) {
        if self.events.is_empty() && !self.is_full() {
            self.bytes.extend(line);
            return;
        }
        if key.is_some()
            && let Some(same) = self.events.iter_mut().find(|waiting| waiting.key == key)
        {
            same.line = line;
            return;
        }
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
            self.dropped += 1;
        }
        self.events.push_back(Waiting { key, line });
    }

    /// So much waits that the client has to read before it is served further.
    pub(super) fn is_full(&self) -> bool {
        self.bytes.len() >= HIGH_MARK
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next bytes to send.
    pub(super) fn next(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// `count` bytes have been sent.
    pub(super) fn sent(&mut self, count: usize) {
        self.bytes.drain(..count);
        while !self.is_full()
            && let Some(waiting) = self.events.pop_front()
        {
            self.bytes.extend(waiting.line);
        }
        if self.bytes.is_empty() && self.bytes.capacity() > 2 * HIGH_MARK {
            // One large reply (a schema) is no reason to keep its memory.
            self.bytes = VecDeque::new();
        }
    }

    pub(super) fn has_dropped(&self) -> bool {
        self.dropped != 0
    }

    /// How many events were dropped since the last time this was asked.
    pub(super) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }
}

/// Bytes after which a client is served no further.
const HIGH_MARK: usize = 64 << 10;
/// Events that wait for a client that does not read.
const MAX_EVENTS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Outbox {
        let mut outbox = Outbox::default();
        outbox.reply(&vec![b'.'; HIGH_MARK]);
        outbox
    }

    #[test]
    fn events_of_one_key_are_told_once_to_who_does_not_read() {
        let mut outbox = full();
        for line in [b"1", b"2", b"3"] {
            outbox.event(Some("a".to_owned()), line.to_vec());
        }
        outbox.event(None, b"x".to_vec());
        outbox.event(None, b"y".to_vec());
        outbox.sent(HIGH_MARK);
        assert_eq!(outbox.next(), b"3xy");
    }

    #[test]
    fn a_flood_is_bounded_and_counted() {
        let mut outbox = full();
        for number in 0..MAX_EVENTS + 5 {
            outbox.event(None, format!("{number};").into_bytes());
        }
        assert_eq!(outbox.take_dropped(), 5);
        outbox.sent(HIGH_MARK);
        assert!(outbox.next().starts_with(b"5;6;"), "the oldest gave way");
    }

    #[test]
    fn what_waits_keeps_its_order() {
        let mut outbox = Outbox::default();
        outbox.reply(b"a");
        outbox.event(None, b"b".to_vec());
        outbox.reply(b"c");
        assert_eq!(outbox.next(), b"abc");
        outbox.sent(2);
        assert_eq!(outbox.next(), b"c");
    }
}
