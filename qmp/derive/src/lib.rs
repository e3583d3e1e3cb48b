//! `#[derive(Qapi)]`.
