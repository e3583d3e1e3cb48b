//! `trellisd`.
fn main() {}
