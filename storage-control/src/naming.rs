//! What a device is called: an id in its label, and a name that is the same on every node (SCL-1).
//!
//! - The id is drawn by mkfs and lies in the label, so that a device is known again behind any local path.
//! - The name lies in the matrix's naming database alone (in the quorum register): nothing on the device or on a node
//!   can contradict it.
//! - A name is never a path and never an option, so that a command can take either.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest name of a device, in bytes.
pub const MAX_DEVICE_NAME: usize = 63;

/// Which device it is, whatever its path: the id in its label. A copy of a device has the same id; that two nodes
/// see one medium is shown by nonces, never by ids.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceId(pub [u8; 16]);

impl DeviceId {
    /// A fresh one.
    pub fn random() -> DeviceId {
        DeviceId(Uuid::new_v4().into_bytes())
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a device is called in its matrix: 1 to 63 letters, digits, dots, dashes and underscores of ASCII, the first a
/// letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(String);

/// Why a text is no name of a device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "'{0}' is no name for a device: it has 1 to {MAX_DEVICE_NAME} letters, digits, '.', '-' and '_', the first a letter or digit"
)]
pub struct BadDeviceName(String);

impl DeviceName {
    /// The text of the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = BadDeviceName;

    fn from_str(text: &str) -> Result<DeviceName, BadDeviceName> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let good = text.len() <= MAX_DEVICE_NAME
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(plain);
        if good {
            return Ok(DeviceName(text.to_owned()));
        }
        // Foreign texts may be long.
        Err(BadDeviceName(text.chars().take(MAX_DEVICE_NAME + 1).collect()))
    }
}

impl TryFrom<String> for DeviceName {
    type Error = BadDeviceName;

    fn try_from(text: String) -> Result<DeviceName, BadDeviceName> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> String {
        name.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_name_is_never_a_path_or_an_option() {
        for good in ["disk1", "a", "0", "san-2.lun_7", &"x".repeat(MAX_DEVICE_NAME)] {
            assert_eq!(good.parse::<DeviceName>().map(String::from), Ok(good.to_owned()));
        }
        let long = "x".repeat(MAX_DEVICE_NAME + 1);
        for bad in ["", "-o", ".", "..", "/dev/sdb", "a/b", "a b", "a\n", "d\u{e9}", "a,b", "a=b", &long] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad:?}");
        }
    }
}
