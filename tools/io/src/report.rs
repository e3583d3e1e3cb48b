//! What is printed: sizes, speeds, bytes, and words for errors. Text out of values, no I/O.

use std::fmt::Write;
use std::time::Duration;

use crate::command::Report;

/// Bytes for people: `1.500 KiB`.
pub(crate) fn size(bytes: f64) -> String {
    let step = UNITS.iter().rev().find(|(shift, _)| bytes >= 2f64.powi(*shift));
    let (number, unit) = match step {
        Some((shift, unit)) => (format!("{:.3}", bytes / 2f64.powi(*shift)), *unit),
        None => (format!("{bytes:.6}"), "bytes"),
    };
    let whole = number.strip_suffix(if step.is_some() { ".000" } else { ".000000" });
    format!("{} {unit}", whole.unwrap_or(&number))
}

/// The same of a whole number.
#[expect(clippy::cast_precision_loss, reason = "it is shown with three digits")]
pub(crate) fn whole_size(bytes: u64) -> String {
    size(bytes as f64)
}

/// A request that went well: `bytes` of `asked` at an offset. Empty where nothing is to be said.
#[expect(clippy::cast_precision_loss, reason = "speeds are shown with three digits")]
pub(crate) fn transfer(report: Report, verb: &str, at: u64, bytes: u64, took: Duration) -> String {
    let seconds = took.as_secs_f64().max(1e-9);
    let (speed, rate) = (bytes as f64 / seconds, 1.0 / seconds);
    match report {
        Report::Quiet => String::new(),
        Report::Numbers => format!("{bytes},1,{},{speed:.3},{rate:.3}\n", clock(took, true)),
        Report::Lines => format!(
            "{verb} {bytes}/{bytes} bytes at offset {at}\n{}, 1 ops; {} ({}/sec and {rate:.4} ops/sec)\n",
            whole_size(bytes),
            clock(took, false),
            size(speed),
        ),
    }
}

/// Hours, minutes, seconds and their hundredths; those that are needed, or all.
fn clock(took: Duration, is_full: bool) -> String {
    let (all, part) = (took.as_secs(), took.subsec_millis() / 10);
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    match () {
        () if is_full || hours > 0 => format!("{hours}:{minutes:02}:{seconds:02}.{part:02}"),
        () if minutes > 0 => format!("{minutes:02}:{seconds:02}.{part:02}"),
        () => format!("{seconds:02}.{part:02} sec"),
    }
}

/// Bytes in lines of sixteen, each with its offset.
pub(crate) fn dump(at: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (number, line) in (0u64..).zip(bytes.chunks(16)) {
        let _ = write!(text, "{:08x}:  ", at + number * 16);
        line.iter().for_each(|byte| text.push_str(&format!("{byte:02x} ")));
        text.push(' ');
        text.extend(line.iter().map(|byte| if byte.is_ascii_alphanumeric() { char::from(*byte) } else { '.' }));
        text.push('\n');
    }
    text
}

/// What an image says of itself, in lines that are indented by `depth` steps.
pub(crate) fn specific(data: &serde_json::Value, depth: usize) -> String {
    let mut text = String::new();
    let indent = " ".repeat(4 * depth);
    let lines: Vec<(String, &serde_json::Value)> = match data {
        serde_json::Value::Object(members) => {
            members.iter().map(|(name, value)| (format!("{}:", name.replace('-', " ")), value)).collect()
        }
        serde_json::Value::Array(values) => {
            values.iter().enumerate().map(|(number, value)| (format!("[{number}]:"), value)).collect()
        }
        _ => Vec::new(),
    };
    for (name, value) in lines {
        let _ = match value {
            serde_json::Value::Object(_) | serde_json::Value::Array(_) => {
                write!(text, "{indent}{name}\n{}", specific(value, depth + 1))
            }
            serde_json::Value::String(value) => writeln!(text, "{indent}{name} {value}"),
            value => writeln!(text, "{indent}{name} {value}"),
        };
    }
    text
}

const UNITS: [(i32, &str); 6] = [(10, "KiB"), (20, "MiB"), (30, "GiB"), (40, "TiB"), (50, "PiB"), (60, "EiB")];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_or_none() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (513, "513 bytes"),
            (1024, "1 KiB"),
            (1025, "1.001 KiB"),
            (197_120, "192.500 KiB"),
            (3_997_696, "3.812 MiB"),
            (1 << 60, "1 EiB"),
        ] {
            assert_eq!(whole_size(bytes), text);
        }
        assert_eq!(size(0.115_086_1), "0.115086 bytes");
    }

    #[test]
    fn a_request_is_told_as_it_was_asked() {
        let tenth = Duration::from_millis(100);
        let lines = "wrote 1024/1024 bytes at offset 512\n1 KiB, 1 ops; 00.10 sec (10 KiB/sec and 10.0000 ops/sec)\n";
        assert_eq!(transfer(Report::Lines, "wrote", 512, 1024, tenth), lines);
        assert_eq!(transfer(Report::Numbers, "wrote", 512, 1024, tenth), "1024,1,0:00:00.10,10240.000,10.000\n");
        assert_eq!(transfer(Report::Quiet, "wrote", 512, 1024, tenth), "");
    }

    #[test]
    fn long_times_have_minutes_and_hours() {
        assert_eq!(clock(Duration::from_millis(61_020), false), "01:01.02");
        assert_eq!(clock(Duration::from_secs(3600 + 61), false), "1:01:01.00");
    }

    #[test]
    fn bytes_are_shown_beside_what_they_mean() {
        let text = "00000010:  61 62 63 64 65 66 67 61 62 63 64 65 66 67 20 61  abcdefgabcdefg.a\n00000020:  7a  z\n";
        assert_eq!(dump(16, b"abcdefgabcdefg az"), text);
    }

    #[test]
    fn what_an_image_says_is_indented() {
        let data = serde_json::json!({ "compat": "1.1", "refcount-bits": 16, "bitmaps": [{ "name": "b" }] });
        let text = "    compat: 1.1\n    refcount bits: 16\n    bitmaps:\n        [0]:\n            name: b\n";
        assert_eq!(specific(&data, 1), text);
    }
}
