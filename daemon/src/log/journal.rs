//! Events as the journal takes them: fields, one datagram an event (systemd's "Native Journal Protocol").

use std::fmt::Debug;
use std::os::unix::net::UnixDatagram;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::queue::{self, Writer};

/// Gives each event to the log's thread.
pub(super) struct Journal(Writer);

impl Journal {
    /// Starts the log's thread, and has it send to the journal.
    pub(super) fn start() -> Result<Self, String> {
        Self::at(SOCKET)
    }

    fn at(place: &str) -> Result<Self, String> {
        let reach = || {
            let socket = UnixDatagram::unbound()?;
            socket.connect(place)?;
            std::io::Result::Ok(socket)
        };
        let socket = reach().map_err(|error| format!("cannot reach the journal: {error}"))?;
        let place = place.to_owned();
        let send = move |datagram: &[u8]| {
            if socket.send(datagram).is_err() {
                // The journal was started anew.
                let _ = socket.connect(&place).and_then(|()| socket.send(datagram));
            }
        };
        queue::start(send).map(Self).map_err(|error| format!("cannot start the log's thread: {error}"))
    }
}

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let about = event.metadata();
        let mut fields = Fields::default();
        fields.add("PRIORITY", priority(*about.level()));
        fields.add("SYSLOG_IDENTIFIER", "trellisd");
        fields.add("TARGET", about.target());
        if let (Some(file), Some(line)) = (about.file(), about.line()) {
            fields.add("CODE_FILE", file);
            fields.add("CODE_LINE", &line.to_string());
        }
        event.record(&mut fields);
        self.0.offer(&fields.0);
    }
}

/// A datagram that is being made.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    /// With its length in front a value may have any bytes in it: none of them can forge a field.
    fn add(&mut self, name: &str, value: &str) {
        let value = &value.as_bytes()[..value.len().min(MAX_LOG_FIELD)];
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(b'\n');
        self.0.extend_from_slice(&(value.len() as u64).to_le_bytes());
        self.0.extend_from_slice(value);
        self.0.push(b'\n');
    }

    /// A field of an event of ours. The journal takes capital letters, digits and `_` in a name.
    fn add_own(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.add("MESSAGE", value),
            name => self.add(&format!("F_{}", name.replace('.', "_").to_ascii_uppercase()), value),
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add_own(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add_own(field, &format!("{value:?}"));
    }
}

/// syslog's numbers.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "5",
        Level::DEBUG => "6",
        Level::TRACE => "7",
    }
}

const SOCKET: &str = "/run/systemd/journal/socket";
/// Bytes of one field: what is more is cut off, so that an event fits into a datagram.
const MAX_LOG_FIELD: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn an_event_is_a_datagram_of_fields() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("socket");
        assert!(Journal::at(place.to_str().unwrap()).is_err(), "nobody is there");
        let journal = UnixDatagram::bind(&place).unwrap();
        journal.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let layer = Journal::at(place.to_str().unwrap()).unwrap();
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(the.pid = 7, name = "a\nPRIORITY=0", "of {}", "note");
        });
        let mut datagram = [0; 4096];
        let length = journal.recv(&mut datagram).unwrap();
        let datagram = &datagram[..length];
        let has = |name: &str, value: &str| {
            let mut fields = Fields::default();
            fields.add(name, value);
            datagram.windows(fields.0.len()).any(|part| part == fields.0)
        };
        for (name, value) in [
            ("PRIORITY", "4"),
            ("SYSLOG_IDENTIFIER", "trellisd"),
            ("MESSAGE", "of note"),
            ("F_THE_PID", "7"),
            ("F_NAME", "a\nPRIORITY=0"),
        ] {
            assert!(has(name, value), "{name}: {:?}", String::from_utf8_lossy(datagram));
        }
    }
}
