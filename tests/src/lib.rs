//! Harnesses that tests across rooms share.
