//! Sizes as people write them: `2G`, `512M`, `4096`, `1.5T`.

const UNITS: [(char, u32); 5] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50)];

/// Bytes meant by `text`: a number with an optional unit K, M, G, T or P (powers of 1,024), `iB` or `B` may follow.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let bad = || format!("'{text}' is no size: write a number with K, M, G or T, such as 512M or 2G");
    let upper = text.trim().to_ascii_uppercase();
    let bare = upper.strip_suffix("IB").or_else(|| upper.strip_suffix('B')).unwrap_or(&upper);
    let (digits, shift) = match bare.chars().last().and_then(|last| UNITS.iter().find(|u| u.0 == last)) {
        Some((unit, shift)) => (bare.trim_end_matches(*unit), *shift),
        None => (bare, 0),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty()
        || !whole.bytes().chain(fraction.bytes()).all(|b| b.is_ascii_digit())
        || fraction.len() > 9
    {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let unit = 1u64 << shift;
    let part = match fraction {
        "" => 0,
        f => {
            (u128::from(f.parse::<u64>().map_err(|_| bad())?) * u128::from(unit) / 10u128.pow(f.len() as u32))
                as u64
        }
    };
    whole.checked_mul(unit).and_then(|bytes| bytes.checked_add(part)).ok_or_else(bad)
}

/// `bytes` for people: `2.0 GiB`.
pub(crate) fn show(bytes: u64) -> String {
    match UNITS.iter().rev().find(|(_, shift)| bytes >= 1 << shift) {
        Some((unit, shift)) => format!("{:.1} {unit}iB", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("2g"), Ok(2 << 30));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        assert_eq!(parse("1.5T"), Ok(3 << 39));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "2X", "1.2.3G", "99999999999P", "0x10", "1.G.", "٣G"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_with_their_largest_unit() {
        assert_eq!(show(512), "512 B");
        assert_eq!(show(2 << 30), "2.0 GiB");
        assert_eq!(show(3 << 39), "1.5 TiB");
    }
}
