//! `docs/qmp-reference.md`: every command, event and type, from the types that the parser uses and their comments.

use std::collections::BTreeSet;
use std::fmt::Write;

use daemon::commands::Commands;
use qmp::schema::{Collector, Command, Definition, EnumValue, Kind, Member, Shape, TypeRef, Variant};

/// The page.
pub(super) fn page() -> String {
    let collector = Commands::described();
    let mut page = Page { collector: &collector, text: HEAD.to_owned() };
    let mut commands: Vec<_> = collector.commands().collect();
    commands.sort_by_key(|command| command.name);
    commands.into_iter().for_each(|command| page.command(command));
    page.text.push_str("\n## Events\n");
    collector.events().for_each(|(name, data)| page.event(name, data));
    page.text.push_str("\n## Types\n");
    page.types();
    page.text
}

struct Page<'a> {
    collector: &'a Collector,
    text: String,
}

impl<'a> Page<'a> {
    fn command(&mut self, command: &Command) {
        let unstable = if command.features.is_empty() { String::new() } else { featured(command.features) };
        self.line(&format!("\n### {}{unstable}\n\n{}", command.name, one_line(command.doc)));
        match self.inline(command.arguments) {
            Some(shape) if shape.members.is_empty() => {}
            Some(shape) => {
                self.line("");
                self.members(&shape.members);
            }
            None => self.line(&format!("\nArguments: {}", self.link(command.arguments))),
        }
        if self.inline(command.returns).is_none_or(|shape| !shape.members.is_empty()) {
            self.line(&format!("\nReturns: {}", self.link(command.returns)));
        }
    }

    fn event(&mut self, name: &str, data: TypeRef) {
        let Definition::Object { doc, shape, .. } = self.collector.definition(data) else {
            panic!("{name} has members")
        };
        self.line(&format!("\n### {name}\n\n{}\n", one_line(doc)));
        self.members(&shape.members);
    }

    /// Types that have not been shown with their only command or event, in the order of the alphabet.
    fn types(&mut self) {
        let referred = self.referred();
        let mut types: Vec<_> = self.collector.types().filter(|of| referred.contains(&self.name(*of))).collect();
        types.sort_by_key(|of| self.name(*of));
        types.dedup_by_key(|of| self.name(*of));
        types.into_iter().for_each(|of| self.definition(of));
    }

    fn definition(&mut self, of: TypeRef) {
        let name = self.name(of);
        match self.collector.definition(of) {
            Definition::Builtin { .. } | Definition::Array { .. } => {}
            Definition::Enum { doc, values, .. } => {
                self.line(&format!("\n### {name}\n\n{}\n", one_line(doc)));
                self.values(values);
            }
            Definition::Object { doc, shape, .. } => {
                self.line(&format!("\n### {name}\n\n{}\n", one_line(doc)));
                self.members(&shape.members);
                if let Some((tag, variants)) = &shape.union {
                    self.variants(tag, variants);
                }
            }
            Definition::Alternate { doc, branches, .. } => {
                let links: Vec<_> = branches.iter().map(|branch| self.link(*branch)).collect();
                self.line(&format!("\n### {name}\n\n{}\n\nOne of: {}", one_line(doc), links.join(", ")));
            }
        }
    }

    fn values(&mut self, values: &[EnumValue]) {
        self.line("| value | meaning |\n|---|---|");
        for EnumValue { name, doc, features } in values {
            self.line(&format!("| `{name}`{} | {} |", featured(features), one_line(doc)));
        }
    }

    fn members(&mut self, members: &[Member]) {
        self.line("| member | type | if absent | meaning |\n|---|---|---|---|");
        for member in members {
            let absent = match (&member.default, member.optional) {
                (Some(value), _) => format!("`{value}`"),
                (None, true) => "optional".to_owned(),
                (None, false) => String::new(),
            };
            let (name, features, of) = (member.name, featured(member.features), self.link(member.of));
            self.line(&format!("| `{name}`{features} | {of} | {absent} | {} |", one_line(member.doc)));
        }
    }

    fn variants(&mut self, tag: &str, variants: &[Variant]) {
        for Variant { case, of } in variants {
            let more = match self.inline(*of) {
                Some(shape) if shape.members.is_empty() => "nothing more".to_owned(),
                _ => format!("also the members of {}", self.link(*of)),
            };
            self.line(&format!("\nWith `{tag}` = `{case}`: {more}."));
        }
    }

    /// The members of an object that is no union: such an object may stand with its command.
    fn inline(&self, of: TypeRef) -> Option<&'a Shape> {
        match self.collector.definition(of) {
            Definition::Object { shape, .. } => shape.union.is_none().then_some(shape),
            _ => None,
        }
    }

    /// The names of the types that the page links to.
    fn referred(&self) -> BTreeSet<String> {
        let mut referred = BTreeSet::new();
        for command in self.collector.commands() {
            let arguments = self.inline(command.arguments).is_none().then_some(command.arguments);
            referred.extend(arguments.into_iter().chain([command.returns]).map(|of| self.element_name(of)));
        }
        for of in self.collector.types() {
            let parts: Vec<TypeRef> = match self.collector.definition(of) {
                Definition::Object { shape, .. } => {
                    let variants = shape.union.iter().flat_map(|(_, variants)| variants);
                    shape.members.iter().map(|member| member.of).chain(variants.map(|v| v.of)).collect()
                }
                Definition::Alternate { branches, .. } => branches.clone(),
                Definition::Builtin { .. } | Definition::Array { .. } | Definition::Enum { .. } => vec![],
            };
            referred.extend(parts.into_iter().map(|part| self.element_name(part)));
        }
        referred.remove(EMPTY);
        referred
    }

    /// A type's name, leading to its definition if it has one on this page.
    fn link(&self, of: TypeRef) -> String {
        match self.collector.definition(of) {
            Definition::Builtin { kind: Kind::Any } => "any value".to_owned(),
            Definition::Builtin { .. } => self.name(of),
            Definition::Array { element } => format!("list of {}", self.link(*element)),
            _ => format!("[{0}](#{1})", self.name(of), self.name(of).to_lowercase()),
        }
    }

    fn element_name(&self, of: TypeRef) -> String {
        match self.collector.definition(of) {
            Definition::Array { element } => self.element_name(*element),
            _ => self.name(of),
        }
    }

    fn name(&self, of: TypeRef) -> String {
        self.collector.type_name(of)
    }

    fn line(&mut self, line: &str) {
        writeln!(self.text, "{line}").expect("a string grows");
    }
}

fn featured(features: &[&str]) -> String {
    if features.is_empty() { String::new() } else { format!(" ({})", features.join(", ")) }
}

/// A doc comment as one cell of a table.
fn one_line(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

const EMPTY: &str = "Empty";

const HEAD: &str = "\
# QMP reference

Every command, event and type of trellisd, generated from the types that its parser uses; a test keeps this page as it
would be generated now (`TRELLIS_BLESS=1 cargo test -p trellisd --test generated` writes it). `query-qmp-schema` tells
the same to programs, and `--blockdev`, `--export` and `--object` take the arguments of `blockdev-add`,
`block-export-add` and `object-add`. How sessions behave is in [control.md](control.md), what they may ask for at the
most in [limits.md](limits.md).

A command without a table takes no arguments; one without a line `Returns` answers with an empty object.

## Commands
";
