//! What a command that fails is answered with: a class that programs compare and a sentence that people read.

use std::fmt;

/// The outcome of parsing or running a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A command's failure as its client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What programs compare.
    pub class: ErrorClass,
    /// A sentence for people. Clients compare some of these too, so the common ones have constructors.
    pub desc: String,
}

/// The error classes of QMP. Nearly everything is [`ErrorClass::GenericError`]; the others are where clients rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Whatever has no class of its own.
    GenericError,
    /// The command is unknown, or not allowed in this phase of the session.
    CommandNotFound,
    /// A block job that is named does not run.
    DeviceNotActive,
    /// A device or object that is named does not exist.
    DeviceNotFound,
    /// Kept for compatibility; nothing here raises it.
    KVMMissingCap,
}

impl Error {
    /// An error of the given class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self { class, desc: desc.into() }
    }

    /// An error of the class that most have.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// The answer to a command that does not exist.
    pub fn unknown_command(name: &str) -> Self {
        Self::new(ErrorClass::CommandNotFound, format!("The command {name} has not been found"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for Error {}

impl ErrorClass {
    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::KVMMissingCap => "KVMMissingCap",
        }
    }
}
