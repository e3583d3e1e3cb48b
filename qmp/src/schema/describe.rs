//! A type as help and the manual show it: its members with types, defaults and doc comments.

use std::fmt;

use super::{Collector, Definition, Member, Qapi};

/// Describes `T` for people.
pub fn describe<T: Qapi>() -> TypeDoc {
    let mut collector = Collector::new();
    let of = T::type_ref(&mut collector);
    TypeDoc::of(&collector, of)
}

/// A type for people. [`fmt::Display`] gives the text of `--blockdev help`.
#[derive(Clone, Debug, PartialEq)]
pub struct TypeDoc {
    /// The type's name in QAPI.
    pub name: String,
    /// Its doc comment.
    pub doc: String,
    /// An object's members, the tag of a union included.
    pub members: Vec<MemberDoc>,
    /// An enum's names with their doc comments.
    pub values: Vec<(String, String)>,
    /// A union's branches, or an alternate's types: the tag's value and what then may stand beside it.
    pub branches: Vec<(String, TypeDoc)>,
}

/// A member for people.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberDoc {
    /// The name on the wire.
    pub name: String,
    /// The name of its type: `int`, `[BlockdevRef]`.
    pub of: String,
    /// Whether it may be absent.
    pub optional: bool,
    /// What its absence means, as JSON.
    pub default: Option<String>,
    /// The field's doc comment.
    pub doc: String,
    /// Feature names such as `unstable`.
    pub features: Vec<&'static str>,
}

impl TypeDoc {
    /// Describes a collected type. The types of its members are named, not described.
    pub fn of(collector: &Collector, of: super::TypeRef) -> Self {
        let name = collector.type_name(of);
        let mut page = Self { name, doc: String::new(), members: vec![], values: vec![], branches: vec![] };
        match collector.definition(of) {
            Definition::Builtin { .. } | Definition::Array { .. } => {}
            Definition::Enum { doc, values, .. } => {
                page.doc = (*doc).to_owned();
                page.values = values.iter().map(|v| (v.name.to_owned(), v.doc.to_owned())).collect();
            }
            Definition::Object { doc, shape, .. } => {
                page.doc = (*doc).to_owned();
                page.members = shape.members.iter().map(|member| MemberDoc::of(collector, member)).collect();
                let variants = shape.union.iter().flat_map(|(_, variants)| variants);
                page.branches = variants.map(|v| (v.case.to_owned(), Self::of(collector, v.of))).collect();
            }
            Definition::Alternate { doc, branches, .. } => {
                page.doc = (*doc).to_owned();
                page.branches = branches.iter().map(|branch| Self::name_only(collector, *branch)).collect();
            }
        }
        page
    }

    /// An alternate's branch may contain the alternate, so it is named and not followed.
    fn name_only(collector: &Collector, of: super::TypeRef) -> (String, Self) {
        let name = collector.type_name(of);
        (name.clone(), Self { name, doc: String::new(), members: vec![], values: vec![], branches: vec![] })
    }
}

impl MemberDoc {
    fn of(collector: &Collector, member: &Member) -> Self {
        Self {
            name: member.name.to_owned(),
            of: collector.type_name(member.of),
            optional: member.optional,
            default: member.default.as_ref().map(ToString::to_string),
            doc: member.doc.to_owned(),
            features: member.features.to_vec(),
        }
    }
}

impl fmt::Display for TypeDoc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.name, one_line(&self.doc))?;
        self.write_body(f, 2)
    }
}

impl TypeDoc {
    fn write_body(&self, f: &mut fmt::Formatter<'_>, indent: usize) -> fmt::Result {
        for member in &self.members {
            writeln!(f, "{:indent$}{member}", "")?;
        }
        for (value, doc) in &self.values {
            writeln!(f, "{:indent$}{value} - {}", "", one_line(doc))?;
        }
        for (case, branch) in &self.branches {
            writeln!(f, "{:indent$}{case}: {}", "", one_line(&branch.doc))?;
            branch.write_body(f, indent + 2)?;
        }
        Ok(())
    }
}

impl fmt::Display for MemberDoc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=<{}>", self.name, self.of)?;
        if !self.doc.is_empty() {
            write!(f, " - {}", one_line(&self.doc))?;
        }
        match &self.default {
            Some(default) => write!(f, " (default: {default})"),
            None if self.optional => write!(f, " (optional)"),
            None => Ok(()),
        }
    }
}

fn one_line(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Common, Discard, NodeOptions};
    use super::describe;

    #[test]
    fn help_says_type_meaning_and_default_of_each_member() {
        let expected = "\
Common: What every node accepts.
  node-name=<str> - The name by which others refer to this node. (optional)
  read-only=<bool> - Refuse writes. (default: false)
  discard=<BlockdevDiscardOptions> - What happens to discards. (default: \"ignore\")
  cache=<Cache> - How the host caches. (optional)
";
        assert_eq!(describe::<Common>().to_string(), expected);
    }

    #[test]
    fn an_enum_shows_its_values() {
        let expected = "BlockdevDiscardOptions: Modes of discard.\n  ignore - Drop them.\n  unmap - Pass them on.\n";
        assert_eq!(describe::<Discard>().to_string(), expected);
    }

    #[test]
    fn a_union_shows_its_branches_with_their_members() {
        let page = describe::<NodeOptions>();
        assert_eq!((page.members[0].name.as_str(), page.members[0].of.as_str()), ("driver", "BlockdevDriver"));
        let (case, raw) = &page.branches[0];
        assert_eq!((case.as_str(), raw.doc.as_str()), ("raw", "A window on its file."));
        assert_eq!(raw.members[0].of, "BlockdevRef");
        let (_, null) = &page.branches[1];
        assert_eq!(null.members[0].default.as_deref(), Some("1073741824"));
        assert_eq!(null.members[1].features, ["unstable"]);
        let text = page.to_string();
        assert!(text.contains("\n  raw: A window on its file.\n    file=<BlockdevRef>\n"), "{text}");
    }
}
