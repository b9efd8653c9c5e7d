// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Times on the command line.

use std::time::Duration;

/// A time: a whole number of ms, s, m, h or d, for example `500ms`; not 0.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    const FORM: &str = "write a time as 500ms, 60s, 5m, 2h or 30d";
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or(FORM)?;
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        _ => return Err(FORM.into()),
    };
    let number: u64 = number.parse().map_err(|_| FORM)?;
    match number.checked_mul(milliseconds) {
        Some(0) => Err("the time is 0".into()),
        Some(time) => Ok(Duration::from_millis(time)),
        None => Err("the time is too long".into()),
    }
}

/// As [`parse_duration`]; a number without a unit is in seconds.
pub(crate) fn parse_seconds(text: &str) -> Result<Duration, String> {
    parse_with_default(text, "s")
}

/// As [`parse_duration`]; a number without a unit is in milliseconds.
pub(crate) fn parse_milliseconds(text: &str) -> Result<Duration, String> {
    parse_with_default(text, "ms")
}

fn parse_with_default(text: &str, unit: &str) -> Result<Duration, String> {
    let is_number = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    parse_duration(&if is_number { format!("{text}{unit}") } else { text.to_owned() })
}

/// A time in its two largest units, for example `1m 5s`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if seconds == 0 => format!("{}ms", time.as_millis()),
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_duration("30d"), Ok(Duration::from_secs(30 * 86400)));
        assert_eq!(parse_seconds("30"), parse_duration("30s"));
        assert_eq!(parse_milliseconds("30"), parse_duration("30ms"));
        assert_eq!(parse_milliseconds("2m"), parse_duration("120s"));
        assert!(parse_seconds("").is_err() && parse_seconds("0").is_err());
        for text in [
            "",
            "60",
            "s",
            "0s",
            "-1s",
            "1.5h",
            "1 s",
            "18446744073709551615h",
            "99999999999999999999s",
            "1w",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_short() {
        let cases = [
            (0, "0ms"),
            (999, "999ms"),
            (61_999, "1m 1s"),
            (7_260_000, "2h 1m"),
            (90_000_000, "1d 1h"),
        ];
        for (milliseconds, text) in cases {
            assert_eq!(duration(Duration::from_millis(milliseconds)), text);
        }
    }
}
