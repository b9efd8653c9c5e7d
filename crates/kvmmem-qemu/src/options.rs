// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's way to write options: `first,key=value,...`, where two commas stand for one, or a JSON
//! object.

use std::collections::BTreeMap;

use serde_json::Value;

/// One option's properties. A flag without a value is `on`; what comes first without a key has the
/// key that the caller says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options(BTreeMap<String, String>);

impl Options {
    /// Reads an option. What is no property is left out.
    pub fn parse(text: &str, first_key: &str) -> Self {
        if text.trim_start().starts_with('{') {
            return Self::from_json(text);
        }
        let mut map = BTreeMap::new();
        for (number, part) in split(text).into_iter().enumerate() {
            match part.split_once('=') {
                Some((key, value)) => map.insert(key.to_owned(), value.to_owned()),
                None if number == 0 => map.insert(first_key.to_owned(), part),
                None => map.insert(part, "on".to_owned()),
            };
        }
        Self(map)
    }

    fn from_json(text: &str) -> Self {
        let Ok(Value::Object(object)) = serde_json::from_str(text) else { return Self::default() };
        let text = |value: Value| match value {
            Value::String(text) => Some(text),
            Value::Bool(true) => Some("on".to_owned()),
            Value::Bool(false) => Some("off".to_owned()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        Self(object.into_iter().filter_map(|(key, value)| Some((key, text(value)?))).collect())
    }

    /// The value of an option; `None` where it is not given.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Whether a switch is on.
    pub(crate) fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key), Some("on" | "yes" | "true" | "y"))
    }

    /// A size in bytes; a number without a suffix counts `unit` bytes.
    pub(crate) fn size(&self, key: &str, unit: u64) -> Option<u64> {
        size(self.get(key)?, unit)
    }

    pub(crate) fn number(&self, key: &str) -> Option<u32> {
        self.get(key)?.parse().ok()
    }
}

/// The parts between single commas.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.peek() != Some(&',') {
            parts.push(String::new());
            continue;
        }
        if c == ',' {
            chars.next();
        }
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

/// A size as QEMU and other VMMs write it, with an optional suffix `B`, `K`, `M`, `G`, `T`.
pub(crate) fn size(text: &str, unit: u64) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text.get(digits.len()..)?.to_ascii_lowercase().as_str() {
        "" => unit,
        "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        _ => return None,
    };
    match digits.split_once('.') {
        None => digits.parse::<u64>().ok()?.checked_mul(factor),
        // QEMU takes fractions, as in 1.5G.
        Some((whole, fraction)) => {
            let scale = 10u64.checked_pow(u32::try_from(fraction.len()).ok()?)?;
            let fraction = fraction.parse::<u64>().ok()?.checked_mul(factor)? / scale;
            whole.parse::<u64>().ok()?.checked_mul(factor)?.checked_add(fraction)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_ways_say_the_same() {
        let plain = Options::parse(
            "memory-backend-memfd,id=pc.ram,size=4294967296,share=on,x=a,,b",
            "qom-type",
        );
        let json = Options::parse(
            r#"{"qom-type":"memory-backend-memfd","id":"pc.ram","size":4294967296,"share":true,"x":"a,b","list":[1]}"#,
            "qom-type",
        );
        assert_eq!(plain, json);
        assert_eq!(plain.get("qom-type"), Some("memory-backend-memfd"));
        assert_eq!(plain.size("size", 1), Some(1 << 32));
        assert!(plain.is_on("share"));
        assert_eq!(Options::parse("guest=a=b,debug-threads=on", "guest").get("guest"), Some("a=b"));
        assert!(Options::parse("x,server", "backend").is_on("server"));
    }

    #[test]
    fn sizes_have_suffixes() {
        let cases =
            [("512", 512 << 20), ("4G", 4 << 30), ("1.5g", 3 << 29), ("4096k", 4 << 20), ("0", 0)];
        for (text, bytes) in cases {
            assert_eq!(size(text, 1 << 20), Some(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "1x",
            "-1",
            "99999999999999999999",
            "18446744073709551615K",
            "1.2.3",
            "1.99999999999999999999999G",
        ] {
            assert_eq!(size(text, 1), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in ".{0,60}|[a-c=,{}\":0-9.GMK]{0,60}") {
            let options = Options::parse(&text, "first");
            let _ = options.size("first", 1 << 20);
            let _ = size(&text, u64::MAX);
        }
    }
}
