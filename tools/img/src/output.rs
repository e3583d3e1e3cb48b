//! How things are shown: JSON with its members in the order that `qemu-img` gives them, and sizes and dates for people.

use serde_json::Value;

/// Pretty JSON as QEMU's programs print it: four spaces a level, and what is empty on two lines.
pub(crate) fn pretty(value: &Value) -> String {
    let mut text = String::new();
    write_value(&mut text, value, 0);
    text.push('\n');
    text
}

fn write_value(text: &mut String, value: &Value, depth: usize) {
    let (open, close, members): (_, _, Vec<(Option<&String>, &Value)>) = match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().map(|(name, value)| (Some(name), value)).collect();
            members.sort_by_key(|(name, _)| name.map_or(0, |name| place(name)));
            ('{', '}', members)
        }
        Value::Array(values) => ('[', ']', values.iter().map(|value| (None, value)).collect()),
        scalar => return text.push_str(&scalar.to_string()),
    };
    text.push(open);
    for (number, (name, value)) in members.iter().enumerate() {
        text.push_str(if number == 0 { "\n" } else { ",\n" });
        indent(text, depth + 1);
        if let Some(name) = name {
            text.push_str(&format!("{}: ", Value::from(name.as_str())));
        }
        write_value(text, value, depth + 1);
    }
    text.push('\n');
    indent(text, depth);
    text.push(close);
}

fn indent(text: &mut String, depth: usize) {
    text.extend(std::iter::repeat_n("    ", depth));
}

/// Where a member stands among others.
pub(crate) fn place(name: &str) -> usize {
    ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len())
}

/// Members in the order in which QEMU 10.0.2 shows them: that of its tables, which nobody chose.
const ORDER: &[&str] = &[
    // A bitmap.
    "flags",
    // An image, a node, a snapshot, a check.
    "image-end-offset",
    "compressed-clusters",
    "icount",
    "vm-clock-nsec",
    "name",
    "date-sec",
    "date-nsec",
    "vm-clock-sec",
    "id",
    "vm-state-size",
    "info",
    "children",
    "backing-filename-format",
    "snapshots",
    "total-clusters",
    "corruptions",
    "corruptions-fixed",
    "check-errors",
    "leaks",
    "leaks-fixed",
    "virtual-size",
    "allocated-clusters",
    "filename",
    "cluster-size",
    // Keys of an encrypted image, which may have a format too.
    "ivgen-alg",
    "detached-header",
    "hash-alg",
    "cipher-alg",
    "uuid",
    "ivgen-hash-alg",
    "format",
    "fragmented-clusters",
    "actual-size",
    "format-specific",
    "type",
    "data",
    "full-backing-filename",
    "encrypted",
    "backing-filename",
    "dirty-flag",
    // qcow2.
    "compat",
    "compression-type",
    "lazy-refcounts",
    "bitmaps",
    "refcount-bits",
    "encrypt",
    "data-file",
    "data-file-raw",
    "corrupt",
    "extended-l2",
    "granularity",
    // Keys of an encrypted image: the rest.
    "cipher-mode",
    "slots",
    "active",
    "iters",
    "key-offset",
    "stripes",
    "payload-offset",
    "master-key-iters",
    // A measurement.
    "required",
    "fully-allocated",
];

/// A number of bytes with three digits and a unit: `1.06 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let (mut value, mut unit) = (bytes as f64, 0);
    // Three digits hold less than a thousand.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let decimals = match value {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.9995 => 2,
        _ => 3,
    };
    let digits = format!("{value:.decimals$}");
    let digits = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { &digits };
    format!("{digits} {}B", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (197_120, "192 KiB"),
            (1_114_112, "1.06 MiB"),
            (1 << 30, "1 GiB"),
            (10_737_418_240, "10 GiB"),
            (u64::MAX >> 1, "8 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn what_is_empty_takes_two_lines() {
        let text = pretty(&json!({ "format": "raw", "children": [], "filename": "a\"b" }));
        assert_eq!(text, "{\n    \"children\": [\n    ],\n    \"filename\": \"a\\\"b\",\n    \"format\": \"raw\"\n}\n");
    }
}
