//! What went wrong with a request, in the C library's words: scripts compare them.

use block_core::base::IoError;

/// `Input/output error`, without a number behind it.
pub fn strerror(error: IoError) -> String {
    let text = std::io::Error::from_raw_os_error(error.errno()).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_librarys_words() {
        for (error, text) in [
            (IoError::OutOfRange, "Input/output error"),
            (IoError::Unsupported, "Operation not supported"),
            (IoError::Misaligned, "Invalid argument"),
            (IoError::NoSpace, "No space left on device"),
        ] {
            assert_eq!(strerror(error), text);
        }
    }
}
