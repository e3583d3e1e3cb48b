//! `-o a=b,c=d`: options of formats, in the order in which they stand. A comma in a value is doubled, and a name alone is
//! a switch that is turned on.

use block_core::base::{Error, Result};
use qmp::keyval::value;

/// The pairs of all `-o` of a command line, one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pairs(Vec<(String, String)>);

impl Pairs {
    /// Reads the pairs of several `-o`.
    pub fn read<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut pairs = Vec::new();
        for text in texts {
            if !is_list(text) {
                return Err(Error::new(format!("Invalid option list: {text}")));
            }
            let mut rest = text;
            while !rest.is_empty() {
                pairs.push(pair(&mut rest));
            }
        }
        Ok(Self(pairs))
    }

    /// The pairs, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// What is said of a name, the last time that it is.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// Nothing is said.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Says something more.
    pub fn push(&mut self, name: &str, value: impl Into<String>) {
        self.0.push((name.to_owned(), value.into()));
    }

    /// Help is asked for: a list has `help` or `?` in it.
    pub fn ask_for_help(text: &str) -> bool {
        let mut rest = text;
        while !rest.is_empty() {
            if matches!(pair(&mut rest), (name, _) if name == "help" || name == "?") {
                return true;
            }
        }
        false
    }
}

/// A list neither begins nor ends with a comma of its own.
fn is_list(text: &str) -> bool {
    let commas = text.len() - text.trim_end_matches(',').len();
    !text.is_empty() && !text.starts_with(',') && commas.is_multiple_of(2)
}

/// Cuts a pair off.
fn pair(rest: &mut &str) -> (String, String) {
    let end = rest.find(['=', ',']).unwrap_or(rest.len());
    let (name, behind) = rest.split_at(end);
    if let Some(behind) = behind.strip_prefix('=') {
        *rest = behind;
        return (name.to_owned(), value(rest));
    }
    *rest = behind.get(1..).unwrap_or_default();
    match name.strip_prefix("no").filter(|name| !name.is_empty()) {
        Some(name) => (name.to_owned(), "off".to_owned()),
        None => (name.to_owned(), "on".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_keep_their_order_and_their_commas() {
        let pairs = Pairs::read(["a=b,c=d,,e", "a=x,lazy,nolazier"]).unwrap();
        let all: Vec<_> = pairs.iter().collect();
        assert_eq!(all, [("a", "b"), ("c", "d,e"), ("a", "x"), ("lazy", "on"), ("lazier", "off")]);
        assert_eq!(pairs.get("a"), Some("x"));
        for bad in [",", "", "a=b,", ",a=b"] {
            assert_eq!(Pairs::read([bad]).unwrap_err().full(), format!("Invalid option list: {bad}"));
        }
        assert!(Pairs::ask_for_help("a=b,help") && Pairs::ask_for_help("?") && !Pairs::ask_for_help("a=help"));
    }
}
