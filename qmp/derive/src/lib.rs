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

#[cfg(test)]
mod tests {
    use syn::{DeriveInput, parse_quote};

    use super::derive;

    fn refused(input: &DeriveInput) -> String {
        derive(input).unwrap_err().to_string()
    }

    #[test]
    fn what_has_no_qapi_form_is_refused_with_a_hint() {
        let generic = parse_quote! { struct A<T> { a: T } };
        assert_eq!(refused(&generic), "a QAPI type has no parameters");
        let tuple = parse_quote! { struct A(u8); };
        assert_eq!(refused(&tuple), "a QAPI object names its members");
        let holding = parse_quote! { enum A { B(C) } };
        assert!(refused(&holding).starts_with("a name holds nothing; did you mean"));
        let without_tag = parse_quote! { #[qapi(union)] enum A { B(C) } };
        assert_eq!(refused(&without_tag), "say `union, tag = \"…\"`, `alternate`, or neither");
        let default_of_option = parse_quote! { struct A { #[qapi(default)] a: Option<u8> } };
        assert_eq!(refused(&default_of_option), "an Option has no default");
        let flat_default = parse_quote! { struct A { #[qapi(flatten, default)] a: B } };
        assert_eq!(refused(&flat_default), "what is flattened is always there");
        let unknown = parse_quote! { struct A { #[qapi(renamed = "b")] a: u8 } };
        assert_eq!(refused(&unknown), "expected rename, feature, flatten, skip or default");
    }
}
