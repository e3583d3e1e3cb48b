//! What an operator says of a luks node.

use qmp::Qapi;

/// An encrypted disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsLUKS")]
pub struct LuksOptions {
    /// The id of the secret that opens it.
    pub key_secret: Option<String>,
    /// Nothing is asked for that opens it: what the image says of itself can be read, and nothing else. For programs: operators
    /// cannot ask for it.
    #[qapi(skip)]
    pub locked: bool,
}
