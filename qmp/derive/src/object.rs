//! Structs: an object whose members are the fields.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{DataStruct, Field, Fields, GenericArgument, Ident, PathArguments, Type};

use crate::attributes::{ContainerAttributes, DefaultValue, PartAttributes};
use crate::names;

pub(crate) fn derive(ident: &Ident, container: &ContainerAttributes, data: &DataStruct) -> syn::Result<TokenStream> {
    let members = members(&data.fields)?;
    let take = members.iter().map(Member::take);
    let put = members.iter().map(Member::put);
    let shape = members.iter().map(Member::shape);
    let qapi = implement_qapi_for_object(ident, container);
    // A struct may have no members, and then what they would come from is not used.
    let unused = if members.is_empty() { "_" } else { "" };
    let [of, out, collector, described] =
        ["members", "out", "collector", "shape"].map(|name| format_ident!("{unused}{name}"));
    Ok(quote! {
        #[automatically_derived]
        impl ::qmp::schema::Object for #ident {
            fn take(#of: &mut ::qmp::schema::Members<'_>) -> ::qmp::Result<Self> {
                ::core::result::Result::Ok(Self { #(#take)* })
            }

            fn put(&self, #out: &mut ::qmp::schema::Map) {
                #(#put)*
            }

            fn shape(#collector: &mut ::qmp::schema::Collector, #described: &mut ::qmp::schema::Shape) {
                #(#shape)*
            }
        }

        #qapi
    })
}

/// An object is read, written and described by its members alone; so is a union.
pub(crate) fn implement_qapi_for_object(ident: &Ident, container: &ContainerAttributes) -> TokenStream {
    let ContainerAttributes { name, doc, features, .. } = container;
    quote! {
        #[automatically_derived]
        impl ::qmp::schema::Qapi for #ident {
            const KIND: ::qmp::schema::Kind = ::qmp::schema::Kind::Object;

            fn parse(value: ::qmp::schema::Value, at: &::qmp::schema::At<'_>) -> ::qmp::Result<Self> {
                ::qmp::schema::Members::whole(value, at)
            }

            fn to_value(&self) -> ::qmp::schema::Value {
                let mut out = ::qmp::schema::Map::new();
                ::qmp::schema::Object::put(self, &mut out);
                ::qmp::schema::Value::Object(out)
            }

            fn define(collector: &mut ::qmp::schema::Collector) -> ::qmp::schema::Definition {
                ::qmp::schema::Definition::object::<Self>(collector, #name, #doc, &[#(#features),*])
            }
        }
    }
}

struct Member<'a> {
    field: &'a Ident,
    name: String,
    /// What it holds: `T` for `Option<T>`.
    of: &'a Type,
    form: Form,
    attributes: PartAttributes,
}

enum Form {
    Flatten,
    Required,
    Optional,
    Default(TokenStream),
    /// No member at all: only programs set it.
    Skip,
}

fn members(fields: &Fields) -> syn::Result<Vec<Member<'_>>> {
    match fields {
        Fields::Named(fields) => fields.named.iter().map(Member::of).collect(),
        Fields::Unit => Ok(vec![]),
        Fields::Unnamed(fields) => Err(syn::Error::new_spanned(fields, "a QAPI object names its members")),
    }
}

impl<'a> Member<'a> {
    fn of(field: &'a Field) -> syn::Result<Self> {
        let mut attributes = PartAttributes::of(&field.attrs)?;
        let ident = field.ident.as_ref().ok_or_else(|| syn::Error::new_spanned(field, "a QAPI member has a name"))?;
        let name = attributes.rename.take().unwrap_or_else(|| names::member(ident));
        if attributes.skip {
            return Ok(Self { field: ident, name, of: &field.ty, form: Form::Skip, attributes });
        }
        let (form, of) = match (attributes.default.take(), option_of(&field.ty), attributes.flatten) {
            (None, None, true) => (Form::Flatten, &field.ty),
            (_, _, true) => return Err(syn::Error::new_spanned(field, "what is flattened is always there")),
            (None, Some(inner), false) => (Form::Optional, inner),
            (None, None, false) => (Form::Required, &field.ty),
            (Some(_), Some(_), false) => return Err(syn::Error::new_spanned(field, "an Option has no default")),
            (Some(DefaultValue::OfType), None, false) => {
                (Form::Default(quote!(::core::default::Default::default())), &field.ty)
            }
            (Some(DefaultValue::Given(value)), None, false) => (Form::Default(quote!(#value)), &field.ty),
        };
        Ok(Self { field: ident, name, of, form, attributes })
    }

    fn take(&self) -> TokenStream {
        let Self { field, name, .. } = self;
        match &self.form {
            Form::Flatten => quote!(#field: ::qmp::schema::Object::take(members)?,),
            Form::Required => quote!(#field: members.required(#name)?,),
            Form::Optional => quote!(#field: members.optional(#name)?,),
            Form::Default(value) => quote!(#field: members.or_else(#name, || #value)?,),
            Form::Skip => quote!(#field: ::core::default::Default::default(),),
        }
    }

    fn put(&self) -> TokenStream {
        let Self { field, name, .. } = self;
        match &self.form {
            Form::Skip => TokenStream::new(),
            Form::Flatten => quote!(::qmp::schema::Object::put(&self.#field, out);),
            Form::Required | Form::Default(_) => quote!(::qmp::schema::put_member(out, #name, &self.#field);),
            Form::Optional => quote! {
                if let ::core::option::Option::Some(value) = &self.#field {
                    ::qmp::schema::put_member(out, #name, value);
                }
            },
        }
    }

    fn shape(&self) -> TokenStream {
        let Self { name, of, attributes: PartAttributes { doc, features, .. }, .. } = self;
        if matches!(self.form, Form::Flatten) {
            return quote!(<#of as ::qmp::schema::Object>::shape(collector, shape););
        }
        if matches!(self.form, Form::Skip) {
            return TokenStream::new();
        }
        let optional = !matches!(self.form, Form::Required);
        let default = match &self.form {
            Form::Default(value) => quote! {{
                let value: #of = #value;
                ::core::option::Option::Some(::qmp::schema::Qapi::to_value(&value))
            }},
            _ => quote!(::core::option::Option::None),
        };
        quote! {
            shape.members.push(::qmp::schema::Member {
                name: #name,
                of: <#of as ::qmp::schema::Qapi>::type_ref(collector),
                optional: #optional,
                default: #default,
                doc: #doc,
                features: &[#(#features),*],
            });
        }
    }
}

/// `T` of `Option<T>`, however `Option` is qualified.
fn option_of(of: &Type) -> Option<&Type> {
    let path = match of {
        Type::Path(path) => path,
        // A type that a `macro_rules` has passed on.
        Type::Group(group) => return option_of(&group.elem),
        _ => return None,
    };
    let last = path.path.segments.last().filter(|segment| segment.ident == "Option")?;
    let PathArguments::AngleBracketed(arguments) = &last.arguments else { return None };
    match arguments.args.first()? {
        GenericArgument::Type(inner) => Some(inner),
        _ => None,
    }
}
