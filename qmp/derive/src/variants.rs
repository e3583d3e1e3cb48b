//! Enums: names, flat unions and alternates.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{DataEnum, Fields, Ident, Type, Variant};

use crate::attributes::{ContainerAttributes, PartAttributes};
use crate::{names, object};

/// An enumeration of names.
pub(crate) fn derive_names(
    ident: &Ident,
    container: &ContainerAttributes,
    data: &DataEnum,
) -> syn::Result<TokenStream> {
    let branches = branches(data)?;
    if let Some(branch) = branches.iter().find(|branch| branch.holds.is_some()) {
        let hint = "a name holds nothing; did you mean `#[qapi(union, tag = \"…\")]` or `#[qapi(alternate)]`?";
        return Err(syn::Error::new_spanned(branch.ident, hint));
    }
    let idents: Vec<_> = branches.iter().map(|branch| branch.ident).collect();
    let names: Vec<_> = branches.iter().map(|branch| &branch.name).collect();
    let values = branches.iter().map(Branch::enum_value);
    let ContainerAttributes { name, doc, .. } = container;
    Ok(quote! {
        #[automatically_derived]
        impl ::qmp::schema::Enum for #ident {
            const NAMES: &'static [&'static str] = &[#(#names),*];

            fn name(self) -> &'static str {
                match self {
                    #(Self::#idents => #names,)*
                }
            }

            fn from_name(name: &str) -> ::core::option::Option<Self> {
                match name {
                    #(#names => ::core::option::Option::Some(Self::#idents),)*
                    _ => ::core::option::Option::None,
                }
            }
        }

        #[automatically_derived]
        impl ::qmp::schema::Qapi for #ident {
            const KIND: ::qmp::schema::Kind = ::qmp::schema::Kind::String;

            fn parse(value: ::qmp::schema::Value, at: &::qmp::schema::At<'_>) -> ::qmp::Result<Self> {
                <Self as ::qmp::schema::Enum>::parse_name(value, at)
            }

            fn to_value(&self) -> ::qmp::schema::Value {
                ::qmp::schema::Value::from(::qmp::schema::Enum::name(*self))
            }

            fn define(_: &mut ::qmp::schema::Collector) -> ::qmp::schema::Definition {
                ::qmp::schema::Definition::Enum { name: #name, doc: #doc, values: ::std::vec![#(#values),*] }
            }
        }
    })
}

/// A flat union: the tag picks the variant, the variant takes its members.
pub(crate) fn derive_union(
    ident: &Ident,
    container: &ContainerAttributes,
    data: &DataEnum,
    tag: &str,
    tag_name: &str,
) -> syn::Result<TokenStream> {
    let branches = branches(data)?;
    let names: Vec<_> = branches.iter().map(|branch| &branch.name).collect();
    let matches: Vec<_> = branches.iter().map(Branch::any_pattern).collect();
    let take = branches.iter().map(Branch::take);
    let put = branches.iter().map(Branch::put);
    let holds = branches.iter().map(Branch::object);
    let values = branches.iter().map(Branch::enum_value);
    let tag_ident = format_ident!("{ident}Tag");
    let tag_doc = format!("The values of `{tag}`.");
    let qapi = object::implement_qapi_for_object(ident, container);
    Ok(quote! {
        const _: () = {
            /// The type of the tag, which stands only in descriptions.
            struct #tag_ident;

            impl ::qmp::schema::TagType for #tag_ident {
                fn define() -> ::qmp::schema::Definition {
                    ::qmp::schema::Definition::Enum { name: #tag_name, doc: #tag_doc, values: ::std::vec![#(#values),*] }
                }
            }

            #[automatically_derived]
            impl ::qmp::schema::Object for #ident {
                fn take(members: &mut ::qmp::schema::Members<'_>) -> ::qmp::Result<Self> {
                    match members.tag(#tag, <Self as ::qmp::schema::Union>::TAGS)? {
                        #(#names => #take,)*
                        other => ::core::unreachable!("{other} is not among the tags"),
                    }
                }

                fn put(&self, out: &mut ::qmp::schema::Map) {
                    ::qmp::schema::put_tag(self, out);
                    match self {
                        #(#put,)*
                    }
                }

                fn shape(collector: &mut ::qmp::schema::Collector, shape: &mut ::qmp::schema::Shape) {
                    let tag = collector.tag_type::<#tag_ident>();
                    let variants = ::std::vec![
                        #(::qmp::schema::Variant {
                            case: #names,
                            of: <#holds as ::qmp::schema::Qapi>::type_ref(collector),
                        }),*
                    ];
                    shape.set_union(#tag, tag, variants);
                }
            }
        };

        #[automatically_derived]
        impl ::qmp::schema::Union for #ident {
            const TAG: &'static str = #tag;
            const TAGS: &'static [&'static str] = &[#(#names),*];

            fn tag(&self) -> &'static str {
                match self {
                    #(#matches => #names,)*
                }
            }
        }

        #qapi
    })
}

/// An alternate: the JSON type picks the variant.
pub(crate) fn derive_alternate(
    ident: &Ident,
    container: &ContainerAttributes,
    data: &DataEnum,
) -> syn::Result<TokenStream> {
    let branches = branches(data)?;
    let holds: Vec<_> = branches.iter().map(Branch::type_or_null).collect();
    let numbers = 0..branches.len();
    let parse = branches.iter().map(Branch::parse);
    let to_value = branches.iter().map(Branch::to_value);
    let ContainerAttributes { name, doc, .. } = container;
    Ok(quote! {
        #[automatically_derived]
        impl ::qmp::schema::Alternate for #ident {
            const KINDS: &'static [::qmp::schema::Kind] = &[#(<#holds as ::qmp::schema::Qapi>::KIND),*];
        }

        #[automatically_derived]
        impl ::qmp::schema::Qapi for #ident {
            /// An alternate inside an alternate has no JSON type to be chosen by.
            const KIND: ::qmp::schema::Kind = ::qmp::schema::Kind::Any;

            fn parse(value: ::qmp::schema::Value, at: &::qmp::schema::At<'_>) -> ::qmp::Result<Self> {
                match <Self as ::qmp::schema::Alternate>::choose(&value, at) {
                    #(::core::option::Option::Some(#numbers) => #parse,)*
                    _ => ::core::result::Result::Err(at.wrong_type(#name)),
                }
            }

            fn to_value(&self) -> ::qmp::schema::Value {
                match self {
                    #(#to_value,)*
                }
            }

            fn define(collector: &mut ::qmp::schema::Collector) -> ::qmp::schema::Definition {
                let branches = ::std::vec![#(<#holds as ::qmp::schema::Qapi>::type_ref(collector)),*];
                ::qmp::schema::Definition::Alternate { name: #name, doc: #doc, branches }
            }
        }
    })
}

struct Branch<'a> {
    ident: &'a Ident,
    name: String,
    holds: Option<&'a Type>,
    attributes: PartAttributes,
}

fn branches(data: &DataEnum) -> syn::Result<Vec<Branch<'_>>> {
    data.variants.iter().map(Branch::of).collect()
}

impl<'a> Branch<'a> {
    fn of(variant: &'a Variant) -> syn::Result<Self> {
        let mut attributes = PartAttributes::of(&variant.attrs)?;
        let name = attributes.rename.take().unwrap_or_else(|| names::value(&variant.ident));
        let holds = match &variant.fields {
            Fields::Unit => None,
            Fields::Unnamed(fields) if fields.unnamed.len() == 1 => Some(&fields.unnamed[0].ty),
            other => return Err(syn::Error::new_spanned(other, "a variant holds one type or none")),
        };
        Ok(Self { ident: &variant.ident, name, holds, attributes })
    }

    fn enum_value(&self) -> TokenStream {
        let Self { name, attributes: PartAttributes { doc, features, .. }, .. } = self;
        quote!(::qmp::schema::EnumValue { name: #name, doc: #doc, features: &[#(#features),*] })
    }

    fn any_pattern(&self) -> TokenStream {
        let ident = self.ident;
        if self.holds.is_some() { quote!(Self::#ident(_)) } else { quote!(Self::#ident) }
    }

    fn take(&self) -> TokenStream {
        let ident = self.ident;
        match self.holds {
            Some(_) => quote!(::qmp::schema::Object::take(members).map(Self::#ident)),
            None => quote!(::core::result::Result::Ok(Self::#ident)),
        }
    }

    fn put(&self) -> TokenStream {
        let ident = self.ident;
        match self.holds {
            Some(_) => quote!(Self::#ident(branch) => ::qmp::schema::Object::put(branch, out)),
            None => quote!(Self::#ident => {}),
        }
    }

    /// A branch without members is the empty object.
    fn object(&self) -> TokenStream {
        self.holds.map_or_else(|| quote!(::qmp::schema::Empty), |holds| quote!(#holds))
    }

    /// An alternate's variant that holds nothing is `null`.
    fn type_or_null(&self) -> TokenStream {
        self.holds.map_or_else(|| quote!(()), |holds| quote!(#holds))
    }

    fn parse(&self) -> TokenStream {
        let ident = self.ident;
        match self.holds {
            Some(_) => quote!(::qmp::schema::Qapi::parse(value, at).map(Self::#ident)),
            None => quote!(::core::result::Result::Ok(Self::#ident)),
        }
    }

    fn to_value(&self) -> TokenStream {
        let ident = self.ident;
        match self.holds {
            Some(_) => quote!(Self::#ident(held) => ::qmp::schema::Qapi::to_value(held)),
            None => quote!(Self::#ident => ::qmp::schema::Value::Null),
        }
    }
}
