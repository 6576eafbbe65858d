//! Finds the devices that the naming database names, by the ids in their labels (SCL-1). Paths mean nothing: each node
//! opens what its operator names, and only the label says which device of the matrix that is.

use std::sync::Arc;

use membership::NamingDatabase;
use storage_control::{Device, DeviceName, Label};

/// What this node has opened: one device, as long as a daemon mounts from one.
#[derive(Clone)]
pub(super) struct Opened {
    /// As it was read when the device was opened.
    pub(super) label: Label,
    /// Behind the gate.
    pub(super) device: Arc<dyn Device>,
    /// The name that the operator expects it to have.
    pub(super) expected: Option<DeviceName>,
}

impl Opened {
    /// Whether every device of the matrix is here, and what was opened is the one expected; or what is wrong.
    pub(super) async fn find(self, names: NamingDatabase) -> Result<(), String> {
        // As it is now: a path may lead elsewhere by the time the names change.
        self.label.verify(&*self.device).await.map_err(|error| error.to_string())?;
        self.compare(&names)
    }

    fn compare(&self, names: &NamingDatabase) -> Result<(), String> {
        let Some(here) = names.by_id(self.label.device) else {
            let known: Vec<String> =
                names.devices.iter().map(|device| format!("{} ({})", device.name, device.id)).collect();
            return Err(format!(
                "this is device {}, which the matrix does not have; its devices are {}",
                self.label.device,
                known.join(", ")
            ));
        };
        if let Some(expected) = self.expected.as_ref().filter(|expected| **expected != here.name) {
            return Err(format!(
                "this is device {}, not {expected}: name another path, or leave -o device={expected} out",
                here.name
            ));
        }
        if self.device.blocks() < here.blocks {
            return Err(format!(
                "device {} has {} blocks here and {} in the matrix: it was cut off",
                here.name,
                self.device.blocks(),
                here.blocks
            ));
        }
        match names.devices.iter().find(|device| device.id != here.id) {
            Some(other) => Err(format!(
                "device {} ({}) of this matrix is not open here, and this version of matrix mounts from one device",
                other.name, other.id
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use membership::Role;
    use storage_control::{DeviceId, MemDevice, block_on};

    use super::*;

    const BLOCKS: u64 = 20_000;

    fn opened(expected: Option<&str>) -> Opened {
        let label = Label::new(BLOCKS, "", None, Default::default()).expect("a label");
        let device = MemDevice::new(BLOCKS);
        block_on(label.write(&device)).expect("written");
        let expected = expected.map(|name| name.parse().expect("a name"));
        Opened { label, device: Arc::new(device), expected }
    }

    fn names(opened: &Opened) -> NamingDatabase {
        NamingDatabase::of_one("disk1".parse().expect("a name"), opened.label.device, BLOCKS)
    }

    #[track_caller]
    fn assert_refused(opened: Opened, names: NamingDatabase, words: &[&str]) {
        let why = block_on(opened.find(names)).expect_err("not found");
        assert!(words.iter().all(|word| why.contains(word)), "{why}");
    }

    #[test]
    fn a_device_is_found_by_its_label() {
        for expected in [None, Some("disk1")] {
            let opened = opened(expected);
            let names = names(&opened);
            block_on(opened.find(names)).expect("found");
        }
    }

    #[test]
    fn a_device_that_is_not_the_one_expected_is_told_by_both_names() {
        let opened = opened(Some("disk2"));
        let names = names(&opened);
        assert_refused(opened, names, &["disk1", "disk2"]);
    }

    #[test]
    fn a_device_without_a_name_in_the_matrix_is_refused() {
        let opened = opened(None);
        let mut names = names(&opened);
        names.devices[0].id = DeviceId([7; 16]);
        assert_refused(opened, names, &["does not have", "disk1", "07070707-"]);
    }

    #[test]
    fn a_matrix_with_devices_that_are_not_here_is_not_known() {
        let opened = opened(None);
        let mut names = names(&opened);
        let other = membership::Device {
            name: "disk2".parse().expect("a name"),
            id: DeviceId([7; 16]),
            blocks: 1,
            role: Role::Data,
        };
        names.devices.push(other);
        assert_refused(opened, names, &["disk2", "not open here"]);
    }

    #[test]
    fn a_path_that_leads_elsewhere_by_now_is_noticed() {
        let (opened, other) = (opened(None), Label::new(BLOCKS, "", None, Default::default()));
        let names = names(&opened);
        block_on(other.expect("a label").write(&*opened.device)).expect("written");
        assert_refused(opened, names, &["file system"]);
    }

    #[test]
    fn a_device_that_shrank_is_noticed() {
        let opened = opened(None);
        let mut names = names(&opened);
        names.devices[0].blocks += 1;
        assert_refused(opened, names, &["cut off"]);
    }
}
