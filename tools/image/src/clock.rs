//! Moments as people read them, in the zone of this machine or of `TZ`.

/// `2026-11-27 19:04:15` for seconds since 1970.
#[expect(unsafe_code, reason = "the C library alone knows all that TZ may say")]
pub fn local_time(seconds: i64) -> String {
    let seconds = libc::time_t::from(seconds);
    let mut broken = std::mem::MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are to values of ours that live across the call, which writes to the second alone; and nobody
    // changes the environment, which it reads, since no program of ours does.
    let known = unsafe { !libc::localtime_r(&raw const seconds, broken.as_mut_ptr()).is_null() };
    // SAFETY: all of it is numbers and a pointer that is not followed, for which zeroes are values.
    let time = unsafe { broken.assume_init() };
    if !known {
        return "unknown".to_owned();
    }
    let (year, month) = (i64::from(time.tm_year) + 1900, time.tm_mon + 1);
    let (day, hour, minute, second) = (time.tm_mday, time.tm_hour, time.tm_min, time.tm_sec);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_their_usual_form() {
        // Whatever the zone is, this is within a day of the beginning.
        let text = local_time(86_400);
        assert!(text.starts_with("1970-01-0") && text.len() == 19, "{text}");
        assert_eq!(local_time(i64::MAX), "unknown");
    }
}
