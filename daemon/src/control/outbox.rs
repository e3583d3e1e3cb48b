//! What a client has still to be sent. Bounded whatever it reads and whatever happens: replies hold the next command
//! back, and of events that do not fit the oldest give way.

use std::collections::VecDeque;

/// Bytes on their way to one client.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// In pieces, so that a long reply is never moved as a whole.
    pieces: VecDeque<Vec<u8>>,
    /// Bytes of the first piece that have been sent.
    sent: usize,
    /// Bytes that have not been sent.
    len: usize,
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
    pub(super) fn reply(&mut self, line: Vec<u8>) {
        self.len += line.len();
        match self.pieces.back_mut().filter(|last| last.len() + line.len() <= HIGH_MARK) {
            Some(last) => last.extend(line),
            None => self.pieces.push_back(line),
        }
    }

    /// Adds an event. While the client does not read, a later one of the same key replaces an earlier one.
    pub(super) fn event(&mut self, key: Option<String>, line: Vec<u8>) {
        if self.events.is_empty() && !self.is_full() {
            self.reply(line);
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
        self.len >= HIGH_MARK
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The next bytes to send.
    pub(super) fn next(&self) -> &[u8] {
        self.pieces.front().map(|first| &first[self.sent..]).unwrap_or_default()
    }

    /// `count` bytes have been sent.
    pub(super) fn sent(&mut self, count: usize) {
        self.len -= count;
        self.sent += count;
        while let Some(first) = self.pieces.front()
            && first.len() <= self.sent
        {
            self.sent -= first.len();
            self.pieces.pop_front();
        }
        while !self.is_full()
            && let Some(waiting) = self.events.pop_front()
        {
            self.reply(waiting.line);
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
        outbox.reply(vec![b'.'; HIGH_MARK]);
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
        outbox.reply(b"a".to_vec());
        outbox.event(None, b"b".to_vec());
        outbox.reply(b"c".to_vec());
        assert_eq!(outbox.next(), b"abc");
        outbox.sent(2);
        assert_eq!(outbox.next(), b"c");
    }

    #[test]
    fn replies_in_pieces_are_sent_in_order_however_much_is_taken() {
        for taken in [1, 7, HIGH_MARK - 1, HIGH_MARK, 3 * HIGH_MARK] {
            let (mut outbox, mut all, mut sent) = (Outbox::default(), Vec::<u8>::new(), Vec::<u8>::new());
            for (byte, length) in (0..).zip([5, HIGH_MARK, 0, 1, 2 * HIGH_MARK, 3, 3]) {
                outbox.reply(vec![byte; length]);
                all.extend(vec![byte; length]);
            }
            while !outbox.is_empty() {
                let next = outbox.next();
                assert!(!next.is_empty());
                let count = next.len().min(taken);
                sent.extend(&next[..count]);
                outbox.sent(count);
            }
            assert!(sent == all && outbox.next().is_empty());
        }
    }
}
