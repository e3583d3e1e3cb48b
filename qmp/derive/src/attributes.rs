//! What `#[qapi(…)]` and doc comments say.

use syn::{Attribute, DeriveInput, Expr, ExprLit, Lit, LitStr, Meta, meta::ParseNestedMeta};

/// Of a struct or an enum.
pub(crate) struct ContainerAttributes {
    pub(crate) name: String,
    pub(crate) doc: String,
    pub(crate) features: Vec<String>,
    pub(crate) form: EnumForm,
}

/// What an enum stands for; a struct has the first.
pub(crate) enum EnumForm {
    Names,
    Alternate,
    Union { tag: String, tag_name: String },
}

/// Of a field or a variant.
pub(crate) struct PartAttributes {
    pub(crate) rename: Option<String>,
    pub(crate) doc: String,
    pub(crate) features: Vec<String>,
    pub(crate) flatten: bool,
    pub(crate) skip: bool,
    pub(crate) default: Option<DefaultValue>,
}

/// What an absent member stands for.
pub(crate) enum DefaultValue {
    OfType,
    Given(Expr),
}

impl ContainerAttributes {
    pub(crate) fn of(input: &DeriveInput) -> syn::Result<Self> {
        let (mut name, mut features) = (input.ident.to_string(), vec![]);
        let (mut union, mut alternate, mut tag, mut tag_name) = (false, false, None, None);
        each_qapi(&input.attrs, |meta| {
            match key(&meta).as_str() {
                "name" => name = text(&meta)?,
                "feature" => features.push(text(&meta)?),
                "union" => union = true,
                "alternate" => alternate = true,
                "tag" => tag = Some(text(&meta)?),
                "tag_name" => tag_name = Some(text(&meta)?),
                _ => return Err(meta.error("expected name, feature, union, alternate, tag or tag_name")),
            }
            Ok(())
        })?;
        let form = match (union, alternate, tag) {
            (false, false, None) => EnumForm::Names,
            (false, true, None) => EnumForm::Alternate,
            (true, false, Some(tag)) => {
                EnumForm::Union { tag, tag_name: tag_name.unwrap_or_else(|| format!("{name}Tag")) }
            }
            _ => {
                return Err(syn::Error::new_spanned(&input.ident, "say `union, tag = \"…\"`, `alternate`, or neither"));
            }
        };
        Ok(Self { name, doc: doc(&input.attrs), features, form })
    }
}

impl PartAttributes {
    pub(crate) fn of(attributes: &[Attribute]) -> syn::Result<Self> {
        let mut part =
            Self { rename: None, doc: doc(attributes), features: vec![], flatten: false, skip: false, default: None };
        each_qapi(attributes, |meta| {
            match key(&meta).as_str() {
                "rename" => part.rename = Some(text(&meta)?),
                "feature" => part.features.push(text(&meta)?),
                "flatten" => part.flatten = true,
                "skip" => part.skip = true,
                "default" => part.default = Some(default_value(&meta)?),
                _ => return Err(meta.error("expected rename, feature, flatten, skip or default")),
            }
            Ok(())
        })?;
        Ok(part)
    }
}

fn each_qapi(
    attributes: &[Attribute],
    mut each: impl FnMut(ParseNestedMeta<'_>) -> syn::Result<()>,
) -> syn::Result<()> {
    attributes.iter().filter(|a| a.path().is_ident("qapi")).try_for_each(|a| a.parse_nested_meta(&mut each))
}

fn key(meta: &ParseNestedMeta<'_>) -> String {
    meta.path.get_ident().map(ToString::to_string).unwrap_or_default()
}

fn text(meta: &ParseNestedMeta<'_>) -> syn::Result<String> {
    Ok(meta.value()?.parse::<LitStr>()?.value())
}

fn default_value(meta: &ParseNestedMeta<'_>) -> syn::Result<DefaultValue> {
    if !meta.input.peek(syn::Token![=]) {
        return Ok(DefaultValue::OfType);
    }
    Ok(DefaultValue::Given(meta.value()?.parse()?))
}

/// The doc comment as text, one line a line.
fn doc(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            Expr::Lit(ExprLit { lit: Lit::Str(line), .. }) => Some(line.value()),
            _ => None,
        },
        _ => None,
    });
    lines.map(|line| line.strip_prefix(' ').unwrap_or(&line).to_owned()).collect::<Vec<_>>().join("\n")
}
