//! The block graph and everything that moves bytes.
