//! What a device is, for people (SCL-4). Nothing is decided from it.

use std::fs;
use std::path::Path;

use crate::device::Device;
use crate::file_device::FileDevice;
use crate::medium::{Medium, whole_disk};
use crate::sys;

/// What this node's kernel says of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceInfo {
    /// Its size in blocks of 4 KiB.
    pub blocks: u64,
    /// Where its data lie.
    pub medium: Medium,
    /// Whether I/O goes past the page cache.
    pub direct: bool,
    /// Bytes of a sector: what the device writes at once. `None` for an image.
    pub sector_bytes: Option<u32>,
    /// Maker and model, where the device tells.
    pub model: Option<String>,
}

impl DeviceInfo {
    /// Asks the kernel; what it does not say is left out.
    pub fn of(device: &FileDevice) -> DeviceInfo {
        let (sector_bytes, model) = match device.medium() {
            Medium::LocalImage | Medium::SharedImage => (None, None),
            Medium::LocalLoop => (sys::block_device_sector(device).ok(), None),
            Medium::Block { major, minor } => {
                let sysfs = Path::new("/sys/dev/block").join(format!("{major}:{minor}"));
                (sys::block_device_sector(device).ok(), model(&sysfs))
            }
        };
        let (blocks, medium) = (device.blocks(), device.medium().clone());
        DeviceInfo { blocks, medium, direct: device.is_direct(), sector_bytes, model }
    }
}

/// Maker and model of the disk behind a directory of sysfs, which may be a partition's.
fn model(sysfs: &Path) -> Option<String> {
    let disk = whole_disk(sysfs)?;
    let read = |name: &str| fs::read_to_string(disk.join("device").join(name)).ok();
    let words: Vec<String> =
        ["vendor", "model"].into_iter().filter_map(read).map(|text| text.trim().to_owned()).collect();
    Some(words.join(" ")).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_device::OpenAs;

    #[test]
    fn an_image_has_a_size_and_a_medium_but_no_sectors() {
        let dir = tempfile::tempdir().unwrap();
        let device = FileDevice::create(dir.path().join("image"), 8 << 20, OpenAs::default()).unwrap();
        let info = DeviceInfo::of(&device);
        assert_eq!((info.blocks, info.sector_bytes, info.model), (2048, None, None));
        assert_eq!((&info.medium, info.direct), (device.medium(), device.is_direct()));
    }

    #[test]
    fn a_partition_has_the_model_of_its_disk() {
        let sysfs = tempfile::tempdir().unwrap();
        let (device, partition) = (sysfs.path().join("sda/device"), sysfs.path().join("sda/sda1"));
        fs::create_dir_all(&device).unwrap();
        fs::create_dir_all(&partition).unwrap();
        assert_eq!(model(&partition), None);
        fs::write(device.join("vendor"), "LIO-ORG \n").unwrap();
        fs::write(device.join("model"), "disk0           \n").unwrap();
        fs::write(partition.join("partition"), "1\n").unwrap();
        assert_eq!(model(&partition).as_deref(), Some("LIO-ORG disk0"));
    }
}
