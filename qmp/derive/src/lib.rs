//! `#[derive(Qapi)]`: reader, writer and description of an option type. The attributes are listed in `qmp::schema`.
//!
//! The generated code only names members and calls `qmp::schema`; whatever decides something is written there.

mod attributes;
mod names;
mod object;
mod variants;

use proc_macro2::TokenStream;
use syn::{Data, DeriveInput, parse_macro_input, spanned::Spanned};

use attributes::{ContainerAttributes, EnumForm};

/// Implements `qmp::schema::Qapi`, and `Object`, `Union`, `Enum` or `Alternate` as the type's form says.
#[proc_macro_derive(Qapi, attributes(qapi))]
pub fn derive_qapi(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    derive(&input).unwrap_or_else(|error| error.into_compile_error()).into()
}

fn derive(input: &DeriveInput) -> syn::Result<TokenStream> {
    if !input.generics.params.is_empty() {
        return Err(syn::Error::new(input.generics.span(), "a QAPI type has no parameters"));
    }
    let container = ContainerAttributes::of(input)?;
    match (&input.data, &container.form) {
        (Data::Struct(data), EnumForm::Names) => object::derive(&input.ident, &container, data),
        (Data::Struct(_), _) => Err(syn::Error::new(input.span(), "`union` and `alternate` are for enums")),
        (Data::Enum(data), EnumForm::Names) => variants::derive_names(&input.ident, &container, data),
        (Data::Enum(data), EnumForm::Alternate) => variants::derive_alternate(&input.ident, &container, data),
        (Data::Enum(data), EnumForm::Union { tag, tag_name }) => {
            variants::derive_union(&input.ident, &container, data, tag, tag_name)
        }
        (Data::Union(_), _) => Err(syn::Error::new(input.span(), "a QAPI type is a struct or an enum")),
    }
}
