//! Two errors: a request ends in a small [`IoError`]; an operator gets an [`Error`], a sentence with its causes.

use std::borrow::Cow;

/// Why a request failed. Small and `Copy`: it travels with every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// The range is not inside the node.
    OutOfRange,
    /// The range or the buffer is not aligned as the node demands.
    Misaligned,
    /// The node, or this way to it, is read-only.
    ReadOnly,
    /// The storage below is full (ENOSPC, EDQUOT).
    NoSpace,
    /// Memory for the request could not be had.
    NoMemory,
    /// The node cannot do this at all; where there is a fallback, the pipeline takes it.
    Unsupported,
    /// An earlier flush failed: what was written since the last good one may be lost, until the node is reopened.
    FlushLatched,
    /// The kernel or a peer said so; the value is a positive errno.
    Os(i32),
}

impl IoError {
    /// From a positive errno, by the meaning it has for a request.
    pub fn from_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT => Self::NoSpace,
            libc::ENOMEM => Self::NoMemory,
            libc::EOPNOTSUPP | libc::ENOSYS => Self::Unsupported,
            other => Self::Os(other),
        }
    }

    /// The positive errno that says this best.
    pub fn errno(self) -> i32 {
        match self {
            Self::OutOfRange | Self::FlushLatched => libc::EIO,
            Self::Misaligned => libc::EINVAL,
            Self::ReadOnly => libc::EROFS,
            Self::NoSpace => libc::ENOSPC,
            Self::NoMemory => libc::ENOMEM,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::Os(errno) => errno,
        }
    }
}

impl std::fmt::Display for IoError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OutOfRange => f.write_str("the range is outside the node"),
            Self::Misaligned => f.write_str("the request is not aligned"),
            Self::ReadOnly => f.write_str("the node is read-only"),
            Self::NoSpace => f.write_str("no space left"),
            Self::NoMemory => f.write_str("not enough memory"),
            Self::Unsupported => f.write_str("the operation is not supported"),
            Self::FlushLatched => f.write_str("an earlier flush failed"),
            Self::Os(errno) => write!(f, "{}", std::io::Error::from_raw_os_error(*errno)),
        }
    }
}

impl std::error::Error for IoError {}

impl From<std::io::Error> for IoError {
    fn from(error: std::io::Error) -> Self {
        Self::from_errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// What an operator is told: a sentence, and through `source()` its causes. The outer text never repeats the inner.
#[derive(Debug)]
pub struct Error {
    text: Cow<'static, str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// A result for operators.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A sentence without a deeper cause.
    pub fn new(text: impl Into<Cow<'static, str>>) -> Self {
        Self { text: text.into(), source: None }
    }

    /// The sentence and its causes in one line, joined by `: `.
    pub fn full(&self) -> String {
        let mut line = self.text.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            line.push_str(": ");
            line.push_str(&cause.to_string());
            next = cause.source();
        }
        line
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Says what was being done when something failed.
pub trait ResultExt<T> {
    /// Wraps the error: `doing()` is the outer sentence, the error its cause.
    fn doing<S: Into<Cow<'static, str>>>(self, doing: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: std::error::Error + Send + Sync + 'static> ResultExt<T> for std::result::Result<T, E> {
    fn doing<S: Into<Cow<'static, str>>>(self, doing: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| Error { text: doing().into(), source: Some(Box::new(error)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outer_sentence_does_not_repeat_the_inner() {
        let inner: std::result::Result<(), _> = Err(IoError::Os(libc::EACCES));
        let error = inner.doing(|| "Could not open 'x.img'").unwrap_err();
        assert_eq!(error.to_string(), "Could not open 'x.img'");
        assert!(error.full().starts_with("Could not open 'x.img': Permission denied"));
    }

    #[test]
    fn errno_goes_there_and_back() {
        for errno in [libc::EIO, libc::ENOSPC, libc::ENOMEM, libc::EOPNOTSUPP, libc::EROFS, libc::EINTR] {
            assert_eq!(IoError::from_errno(errno).errno(), errno);
        }
    }
}
