//! A monitor's input: lexer, parser, session. What is understood is formatted, and read back as the same; and it does not
//! matter in what pieces the bytes come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qmp::wire::{Event, Layout, Parser, parse_text, to_line};

fuzz_target!(|bytes: &[u8]| {
    let whole = events(bytes, bytes.len().max(1));
    let pieces = events(bytes, 1 + bytes.first().map_or(0, |byte| usize::from(*byte % 7)));
    assert_eq!(whole, pieces);
    for event in whole {
        let Event::Message(value) = event else { continue };
        for layout in [Layout::Compact, Layout::Pretty] {
            let line = String::from_utf8(to_line(&value, layout)).expect("ASCII");
            assert!(line.is_ascii());
            assert_eq!(parse_text(&line).as_ref(), Ok(&value));
        }
    }
});

fn events(bytes: &[u8], piece: usize) -> Vec<Event> {
    let mut parser = Parser::new();
    let mut all = Vec::new();
    for mut piece in bytes.chunks(piece) {
        while let Some(event) = parser.next(&mut piece) {
            all.push(event);
        }
    }
    all
}
