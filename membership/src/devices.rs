//! The naming database: which devices the matrix has, and what each is called on every node (SCL-1).
//!
//! It is part of the view, so it lies where every node looks first, the quorum register. Always (checked with the view):
//! - names and ids are unique, the devices stand in the order of their names, and there is at least one;
//! - the quorum region and the filesystem lie on some device;
//! - its version is the generation of its last change: two contents never have one version, and none is newer than its
//!   view (SMS-9: a change of devices is a new generation).
//!
//! A node *knows* a version when it has found every device of it by the id in the label, whatever the local paths. One
//! that does not know the current version does not come in, does not stand for ADM and is not handed the office (SMS-10).

use serde::{Deserialize, Serialize};
use storage_control::{DeviceId, DeviceName, Generation};

use crate::view::BadView;

/// Most devices a matrix may have: with names of full length they take a fifth of the register's body.
pub const MAX_DEVICES: usize = 48;

/// What lies on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The quorum region, and the filesystem behind it.
    Whole,
    /// A copy of the quorum region alone.
    Quorum,
    /// A part of the filesystem alone.
    Data,
}

/// One device of the matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// What every node calls it.
    pub name: DeviceName,
    /// The id in its label.
    pub id: DeviceId,
    /// Its size in blocks of 4 KiB; the device itself may be larger.
    pub blocks: u64,
    /// What lies on it.
    pub role: Role,
}

/// All devices of the matrix.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamingDatabase {
    /// The generation of its last change; 0 is what mkfs wrote.
    pub version: Generation,
    /// Ascending by name.
    pub devices: Vec<Device>,
}

impl NamingDatabase {
    /// What mkfs writes: one device that holds everything.
    pub fn of_one(name: DeviceName, id: DeviceId, blocks: u64) -> NamingDatabase {
        let devices = vec![Device { name, id, blocks, role: Role::Whole }];
        NamingDatabase { version: Generation(0), devices }
    }

    /// The device with this id in its label.
    pub fn by_id(&self, id: DeviceId) -> Option<&Device> {
        self.devices.iter().find(|device| device.id == id)
    }

    /// The device of this name.
    pub fn named(&self, name: &DeviceName) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == *name)
    }

    /// The invariants of the module's header, for the view of this generation.
    pub(crate) fn check(&self, generation: Generation) -> Result<(), BadView> {
        let bad = |why| Err(BadView(why));
        if self.version > generation {
            return bad("device names of a generation to come");
        }
        if self.devices.len() > MAX_DEVICES {
            return bad("more devices than can be");
        }
        if !self.devices.is_sorted_by(|a, b| a.name < b.name) {
            return bad("device names that are not unique and in order");
        }
        let repeated = |(at, device): (usize, &Device)| self.devices[..at].iter().any(|d| d.id == device.id);
        if self.devices.iter().enumerate().any(repeated) {
            return bad("two names for one device");
        }
        let quorum = self.devices.iter().any(|d| matches!(d.role, Role::Whole | Role::Quorum));
        let data = self.devices.iter().any(|d| matches!(d.role, Role::Whole | Role::Data));
        if !quorum || !data {
            return bad("no device for the quorum region or for the filesystem");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, id: u8, role: Role) -> Device {
        Device { name: name.parse().expect("a name"), id: DeviceId([id; 16]), blocks: 1 << 40, role }
    }

    fn check(devices: Vec<Device>) -> Result<(), BadView> {
        NamingDatabase { version: Generation(3), devices }.check(Generation(3))
    }

    #[test]
    fn names_and_ids_of_devices_are_unique_and_both_roles_are_filled() {
        let (whole, quorum, data) = (Role::Whole, Role::Quorum, Role::Data);
        check(vec![device("a", 1, whole)]).expect("one device");
        check(vec![device("a", 1, quorum), device("b", 2, data)]).expect("two devices");
        for bad in [
            vec![],
            vec![device("a", 1, quorum)],
            vec![device("a", 1, data)],
            vec![device("a", 1, whole), device("a", 2, data)],
            vec![device("b", 1, whole), device("a", 2, data)],
            vec![device("a", 1, whole), device("b", 2, data), device("c", 1, data)],
        ] {
            assert!(check(bad.clone()).is_err(), "{bad:?}");
        }
        let newer = NamingDatabase { version: Generation(4), devices: vec![device("a", 1, whole)] };
        assert!(newer.check(Generation(3)).is_err());
    }

    #[test]
    fn the_largest_naming_database_takes_a_fifth_of_a_body() {
        let name = |n: usize| format!("{n:0>width$}", width = storage_control::naming::MAX_DEVICE_NAME);
        let mut view = crate::View::empty(1, NamingDatabase { version: Generation(0), devices: Vec::new() });
        let without = crate::codec::encode_view(&view).len();
        view.names.devices = (0..MAX_DEVICES).map(|n| device(&name(n), n as u8, Role::Whole)).collect();
        view.check().expect("as many as may be");
        let body = crate::codec::encode_view(&view);
        assert!((body.len() - without) * 5 <= crate::codec::MAX_BODY_BYTES, "{}", body.len() - without);
        assert_eq!(crate::codec::decode_view(&body).expect("our own body"), view);
    }
}
