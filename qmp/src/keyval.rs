//! The command line's `driver=file,node-name=x,file.filename=a,,b` as the tree that QMP would have been given as JSON.
//!
//! Keys nest at dots, a number between dots is a list index, a comma in a value is doubled, and the first key may be
//! left out where an option implies it. Every leaf stays a word: what it means is for the type that reads it, in
//! [`Mode::Keyval`]. JSON is taken in the same place.

use std::iter;

use crate::schema::{MAX_INLINE_DEPTH, Map, Mode, Qapi, Value, from_keyval, from_value};
use crate::wire::parse_text;
use crate::{Error, Result};

/// An option's argument, read but not typed.
#[derive(Clone, Debug, PartialEq)]
pub struct ParsedOption {
    /// An object.
    pub value: Value,
    /// How its scalars are written.
    pub mode: Mode,
    /// Whether the word `help` or `?` stood among the keys.
    pub help: bool,
}

impl ParsedOption {
    /// Reads the argument as a `T`.
    pub fn into_typed<T: Qapi>(self) -> Result<T> {
        match self.mode {
            Mode::Json => from_value(self.value),
            Mode::Keyval => from_keyval(self.value),
        }
    }

    /// The value of a top member that is a word, such as the driver whose help is wanted.
    pub fn word(&self, name: &str) -> Option<&str> {
        self.value.get(name)?.as_str()
    }
}

/// Reads an option's argument: JSON if it begins with `{`, keyval if not.
pub fn parse_option(text: &str, implied_key: Option<&str>) -> Result<ParsedOption> {
    if text.starts_with('{') {
        let value = parse_text(text).map_err(|error| Error::generic(error.to_string()))?;
        return Ok(ParsedOption { value, mode: Mode::Json, help: false });
    }
    let (mut root, mut help) = (Map::new(), false);
    for pair in pairs(text, implied_key) {
        match pair? {
            Pair::Help => help = true,
            Pair::Value { key, value } => insert(&mut root, key, value)?,
        }
    }
    let root = root.into_iter().map(|(name, branch)| Ok((name.clone(), with_lists(branch, &name)?)));
    Ok(ParsedOption { value: Value::Object(root.collect::<Result<_>>()?), mode: Mode::Keyval, help })
}

#[derive(Debug, PartialEq)]
enum Pair<'a> {
    Value { key: &'a str, value: String },
    Help,
}

fn pairs<'a>(text: &'a str, implied_key: Option<&'a str>) -> impl Iterator<Item = Result<Pair<'a>>> {
    let (mut rest, mut implied) = (text, implied_key);
    iter::from_fn(move || (!rest.is_empty()).then(|| pair(&mut rest, implied.take())))
}

/// Cuts one pair off, with the comma behind it.
fn pair<'a>(rest: &mut &'a str, implied: Option<&'a str>) -> Result<Pair<'a>> {
    let end = rest.find([',', '=']).unwrap_or(rest.len());
    let (word, behind) = rest.split_at(end);
    if let Some(behind) = behind.strip_prefix('=') {
        *rest = behind;
        return Ok(Pair::Value { key: word, value: value(rest) });
    }
    *rest = behind.get(1..).unwrap_or_default();
    match (word, implied) {
        ("help" | "?", _) => Ok(Pair::Help),
        (_, Some(key)) if !word.is_empty() => Ok(Pair::Value { key, value: word.to_owned() }),
        ("", _) => Err(invalid(word)),
        _ => Err(Error::generic(format!("Expected '=' after parameter '{word}'"))),
    }
}

/// Cuts a value off, with the comma behind it; two commas stand for one.
pub fn value(rest: &mut &str) -> String {
    let mut out = String::new();
    while let Some((plain, behind)) = rest.split_once(',') {
        out.push_str(plain);
        *rest = behind;
        let Some(behind) = behind.strip_prefix(',') else { return out };
        out.push(',');
        *rest = behind;
    }
    out.push_str(rest);
    *rest = "";
    out
}

fn insert(root: &mut Map, key: &str, value: String) -> Result<()> {
    let mut map = root;
    let mut path_len = 0;
    let steps: Vec<_> = key.split('.').collect();
    check_steps(key, &steps)?;
    let (last, inner) = steps.split_last().ok_or_else(|| invalid(key))?;
    for step in inner {
        path_len += step.len() + 1;
        let branch = map.entry(*step).or_insert_with(|| Value::Object(Map::new()));
        map = branch.as_object_mut().ok_or_else(|| inconsistent(&key[..path_len - 1]))?;
    }
    match map.insert((*last).to_owned(), Value::String(value)) {
        Some(Value::Object(_)) => Err(inconsistent(key)),
        _ => Ok(()),
    }
}

fn check_steps(key: &str, steps: &[&str]) -> Result<()> {
    if steps.len() > MAX_INLINE_DEPTH {
        return Err(Error::generic(format!("Parameter '{key}' is nested deeper than {MAX_INLINE_DEPTH} levels")));
    }
    if let Some(long) = steps.iter().find(|step| step.len() > MAX_STEP_BYTES) {
        return Err(Error::generic(format!("Parameter '{long}' is too long")));
    }
    // A list has to be somewhere: an index does not stand first.
    let valid = is_name(steps[0]) && steps[1..].iter().all(|step| is_name(step) || is_index(step));
    if valid { Ok(()) } else { Err(invalid(key)) }
}

fn is_name(step: &str) -> bool {
    step.starts_with(|c: char| c.is_ascii_alphabetic())
        && step.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
}

fn is_index(step: &str) -> bool {
    step.parse::<u32>().is_ok_and(|index| index.to_string() == step)
}

/// Makes lists of objects whose keys are indexes, from the leaves up.
fn with_lists(value: Value, path: &str) -> Result<Value> {
    let Value::Object(members) = value else { return Ok(value) };
    let indexes = members.keys().filter(|name| is_index(name)).count();
    if indexes != 0 && indexes != members.len() {
        return Err(inconsistent(path));
    }
    let inner = |(name, value): (String, Value)| {
        let value = with_lists(value, &format!("{path}.{name}"))?;
        Ok((name, value))
    };
    let mut members: Map = members.into_iter().map(inner).collect::<Result<_>>()?;
    if indexes == 0 {
        return Ok(Value::Object(members));
    }
    let element = |index: usize| {
        let missing = || Error::generic(format!("Parameter '{path}.{index}' missing"));
        members.swap_remove(&index.to_string()).ok_or_else(missing)
    };
    (0..indexes).map(element).collect::<Result<_>>().map(Value::Array)
}

fn invalid(key: &str) -> Error {
    Error::generic(format!("Invalid parameter '{key}'"))
}

fn inconsistent(path: &str) -> Error {
    Error::generic(format!("Parameters '{path}.*' used inconsistently"))
}

const MAX_STEP_BYTES: usize = 127;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::{ParsedOption, parse_option};
    use crate::Qapi;
    use crate::schema::{Mode, Size, Value};

    fn read(text: &str) -> Value {
        parse_option(text, Some("driver")).unwrap().value
    }

    fn refused(text: &str) -> String {
        parse_option(text, Some("driver")).unwrap_err().desc
    }

    #[test]
    fn keys_nest_and_values_stay_words() {
        let text = "driver=file,node-name=x,file.filename=a,,b=c,file.x_y.z=,read-only=on";
        let tree = json!({
            "driver": "file", "node-name": "x", "file": { "filename": "a,b=c", "x_y": { "z": "" } }, "read-only": "on"
        });
        assert_eq!(read(text), tree);
        assert_eq!(read(""), json!({}));
        assert_eq!(read("null-co,size=1,"), json!({ "driver": "null-co", "size": "1" }));
        assert_eq!(read("size=1,size=2"), json!({ "size": "2" }), "the last one wins");
        assert_eq!(read("a=,,,,"), json!({ "a": ",," }));
        assert_eq!(read("a=,,,b=c"), json!({ "a": ",", "b": "c" }));
    }

    #[test]
    fn indexes_make_lists() {
        let tree = json!({ "driver": "quorum", "children": [{ "driver": "raw" }, "b"], "m": [["x"]] });
        assert_eq!(read("quorum,children.1=b,children.0.driver=raw,m.0.0=x"), tree);
        assert_eq!(refused("children.0=a,children.2=b"), "Parameter 'children.1' missing");
        assert_eq!(refused("a.b.4294967295=x"), "Parameter 'a.b.0' missing");
        assert_eq!(refused("children.0=a,children.x=b"), "Parameters 'children.*' used inconsistently");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for key in ["", ".x", "cache.", "cache..direct", "1x", "-x", "a:b", "0", "a.01", "a.4294967296"] {
            assert_eq!(refused(&format!("raw,{key}=1")), format!("Invalid parameter '{key}'"));
        }
        assert_eq!(refused(",driver=raw"), "Invalid parameter ''");
        assert_eq!(refused("raw,,x"), "Invalid parameter ''");
        assert_eq!(refused("raw,node-name"), "Expected '=' after parameter 'node-name'");
        assert_eq!(refused("cache.direct=on,cache=x"), "Parameters 'cache.*' used inconsistently");
        assert_eq!(refused("cache=x,cache.direct=on"), "Parameters 'cache.*' used inconsistently");
        let long = "a".repeat(128);
        assert_eq!(refused(&format!("{long}=1")), format!("Parameter '{long}' is too long"));
        assert!(refused(&format!("a{}=1", ".a".repeat(64))).ends_with("is nested deeper than 64 levels"));
    }

    #[test]
    fn help_is_a_word_among_the_keys() {
        let help = |text| parse_option(text, Some("qom-type")).unwrap();
        assert_eq!(help("help"), ParsedOption { value: json!({}), mode: Mode::Keyval, help: true });
        assert!(help("?").help);
        let of_type = help("iothread,help");
        assert!(of_type.help);
        assert_eq!(of_type.word("qom-type"), Some("iothread"));
        assert!(!help("iothread,id=help").help);
    }

    #[test]
    fn json_stands_in_the_same_place() {
        let parsed = parse_option("{'driver': \"raw\", 'size': 5}", None).unwrap();
        assert_eq!(
            parsed,
            ParsedOption { value: json!({ "driver": "raw", "size": 5 }), mode: Mode::Json, help: false }
        );
        assert_eq!(refused("{\"driver\":\"raw\""), "JSON parse error, premature EOI");
        assert_eq!(refused("{} x"), "JSON parse error, invalid keyword 'x'");
        assert_eq!(refused("{} {}"), "Expecting at most one JSON value");
        assert_eq!(refused("{} {"), "Expecting at most one JSON value");
    }

    #[test]
    fn both_forms_give_the_same_options() {
        #[derive(Debug, PartialEq, Qapi)]
        struct Disk {
            driver: String,
            size: Size,
            flags: Vec<bool>,
        }
        let typed = |text| parse_option(text, Some("driver")).unwrap().into_typed::<Disk>();
        let disk = Disk { driver: "null".to_owned(), size: Size(4096), flags: vec![true, false] };
        assert_eq!(typed("null,size=4k,flags.0=on,flags.1=off").unwrap(), disk);
        assert_eq!(typed("{'driver':'null','size':4096,'flags':[true,false]}").unwrap(), disk);
        let words_in_json = typed("{'driver':'null','size':'4k','flags':[]}").unwrap_err();
        assert_eq!(words_in_json.desc, "Parameter 'size' expects uint64");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "[a-c0-9.,=?{}é-]{0,40}") {
            // Whatever is taken is a tree of words.
            if let Ok(ParsedOption { value, mode: Mode::Keyval, .. }) = parse_option(&text, Some("driver")) {
                prop_assert!(only_words(&value));
            }
        }

        #[test]
        fn a_value_may_be_any_text(text in any::<String>()) {
            let doubled = text.replace(',', ",,");
            prop_assert_eq!(read(&format!("a.b={doubled},c=d")), json!({ "a": { "b": text }, "c": "d" }));
        }
    }

    fn only_words(value: &Value) -> bool {
        match value {
            Value::Object(members) => members.values().all(only_words),
            Value::Array(elements) => elements.iter().all(only_words),
            other => other.is_string(),
        }
    }
}
