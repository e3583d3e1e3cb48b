//! Image formats: they say where guest data is, and `pipeline` moves it.

pub mod raw;
