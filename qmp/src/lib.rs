//! The QMP language.
