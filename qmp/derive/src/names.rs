//! Rust names to QAPI names: both `snake_case` and `CamelCase` become kebab-case.

/// `node_name` to `node-name`, `r#type` to `type`.
pub(crate) fn member(field: &syn::Ident) -> String {
    let name = field.to_string();
    name.strip_prefix("r#").unwrap_or(&name).replace('_', "-")
}

/// `NullCo` to `null-co`, `Qcow2` to `qcow2`.
pub(crate) fn value(variant: &syn::Ident) -> String {
    let mut name = String::new();
    for letter in variant.to_string().chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('-');
        }
        name.extend(letter.to_lowercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use quote::format_ident;

    use super::{member, value};

    #[test]
    fn names_become_kebab_case() {
        assert_eq!(member(&format_ident!("logical_block_size")), "logical-block-size");
        assert_eq!(member(&format_ident!("r#type")), "type");
        assert_eq!(value(&format_ident!("VhostUserBlk")), "vhost-user-blk");
        assert_eq!(value(&format_ident!("Qcow2")), "qcow2");
    }
}
