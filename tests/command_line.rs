//! What the commands refuse, with which exit code and which words.

mod common;

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use common::{MATRIX, Plan, SOON, path, text, wait_until};

#[test]
fn mkfs_refuses_what_it_would_destroy() {
    let lab = Plan::nodes(0).make();
    let image = lab.image();
    let again = lab.matrix(&["mkfs", path(&image)]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again).contains("--force"), "{}", text(&again));
    assert!(lab.matrix(&["mkfs", path(&image), "--force"]).status.success());

    let ext = lab.dir.join("ext4.img");
    let mut bytes = vec![0u8; 64 << 20];
    bytes[1080..1082].copy_from_slice(&[0x53, 0xef]);
    fs::write(&ext, &bytes).expect("image");
    let other = lab.matrix(&["mkfs", path(&ext)]);
    assert_eq!(other.status.code(), Some(1));
    assert!(text(&other).contains("ext"), "{}", text(&other));

    let missing = lab.matrix(&["mkfs", path(&lab.dir.join("missing"))]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing).contains("--size"), "{}", text(&missing));

    let small = lab.matrix(&["mkfs", path(&lab.dir.join("small")), "--size", "1M"]);
    assert_eq!(small.status.code(), Some(1));
    assert!(text(&small).contains("64"), "{}", text(&small));
}

#[test]
fn mkfs_refuses_a_device_that_a_live_node_uses() {
    let mut lab = Plan::nodes(1).start();
    let image = lab.image();
    let refused = lab.matrix(&["mkfs", path(&image)]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("n0"), "the node is named: {}", text(&refused));
    lab.assert_clean();
}

/// SCL-1: one name on every node, whatever the local path; SCL-4: what a user interface shows of it.
#[test]
fn a_device_has_one_name_on_every_node_whatever_its_path() {
    let mut lab = Plan::nodes(2).make();
    let image = lab.image();
    let made = lab.matrix(&["mkfs", path(&image), "--force", "--device-name", "san7"]);
    assert!(made.status.success() && text(&made).contains("san7"), "{}", text(&made));
    let other = lab.dir.join("other-path.img");
    fs::hard_link(&image, &other).expect("link");
    lab.set_device(1, other.clone());
    lab.set_options(1, "device=san7");
    lab.mount(0);
    lab.mount(1);
    let device = |n: usize| lab.status(n)["devices"][0].clone();
    let (here, there) = (device(0), device(1));
    assert_eq!((here["name"].as_str(), there["name"].as_str()), (Some("san7"), Some("san7")));
    assert!(here["uuid"].is_string() && here["uuid"] == there["uuid"], "{here} {there}");
    assert_eq!(here["here"]["path"].as_str(), image.to_str());
    assert_eq!(there["here"]["path"].as_str(), other.to_str());
    assert_eq!(there["here"]["bytes"].as_u64(), Some(512 << 20));
    for n in 0..2 {
        let knows = |m: &serde_json::Value| m["knows_devices"] == true;
        let all =
            || lab.status(n)["members"].as_array().is_some_and(|all| all.len() == 2 && all.iter().all(knows));
        wait_until("both say that they know the device", SOON, all);
    }
    let shown = text(&lab.matrix(&["status", path(&lab.at(1))]));
    assert!(shown.contains("san7") && shown.contains(path(&other)), "{shown}");
    lab.assert_clean();
}

/// SCL-1: whoever names the device that he means is told when the path leads to another.
#[test]
fn a_device_that_is_not_the_one_named_is_not_mounted() {
    let mut lab = Plan::nodes(1).make();
    lab.set_options(0, "device=san7");
    let said = lab.try_mount(0).expect_err("another device");
    assert!(said.contains("disk1") && said.contains("san7"), "both names: {said}");
    lab.set_options(0, "device=disk1");
    lab.mount(0);
    lab.assert_clean();
    let bad = lab.matrix(&["mkfs", path(&lab.dir.join("new")), "--size", "64M", "--device-name", "/dev/sdb"]);
    assert_eq!(bad.status.code(), Some(2), "{}", text(&bad));
}

#[test]
fn fsck_refuses_a_mounted_filesystem_with_its_own_exit_code() {
    let mut lab = Plan::nodes(1).start();
    let (code, said) = lab.fsck();
    assert_eq!(code, 8, "{said}");
    assert!(said.contains("n0"), "the node is named: {said}");
    lab.assert_clean();
    assert_eq!(lab.matrix(&["fsck"]).status.code(), Some(16));
}

#[test]
fn one_run_directory_has_one_mount() {
    let mut lab = Plan::nodes(1).start();
    let (image, run_dir, other) = (lab.image(), lab.run_dir(0), lab.dir.join("other"));
    fs::create_dir(&other).expect("mkdir");
    let refused = lab.matrix(&["mount", path(&image), path(&other), "--run-dir", path(&run_dir)]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused).contains("--run-dir"), "{}", text(&refused));
    let twice = lab.try_mount(0).expect_err("mounted already");
    assert!(twice.contains("already mounted"), "{twice}");
    lab.assert_clean();
}

#[test]
fn where_nothing_is_mounted_the_commands_say_so() {
    let lab = Plan::nodes(1).make();
    let dir = lab.at(0);
    for command in ["umount", "status", "locks"] {
        let output = lab.matrix(&[command, path(&dir)]);
        assert_eq!(output.status.code(), Some(3), "{command}: {}", text(&output));
    }
}

#[test]
fn a_dead_daemon_is_told_apart_and_cleared_by_force() {
    let mut lab = Plan::nodes(1).start();
    let pid = lab.pid(0);
    common::signal(pid, libc::SIGKILL);
    wait_until("the daemon is gone", SOON, || !common::alive(pid));
    let dir = lab.at(0);
    for command in ["umount", "status"] {
        let output = lab.matrix(&[command, path(&dir)]);
        assert_eq!(output.status.code(), Some(4), "{command}: {}", text(&output));
    }
    lab.clear(0);
    lab.mount(0);
    lab.assert_clean();
}

#[test]
fn the_system_tools_names_are_understood() {
    let lab = Plan::nodes(0).make();
    let image = lab.dir.join("second.img");
    fs::File::create(&image).and_then(|f| f.set_len(128 << 20)).expect("image");
    for (name, args) in
        [("mkfs.mfs", vec!["-L", "data", path(&image)]), ("fsck.mfs", vec!["-a", path(&image)])]
    {
        let alias = lab.dir.join(name);
        std::os::unix::fs::symlink(MATRIX, &alias).expect("symlink");
        common::succeed(Command::new(&alias).args(args).output().expect(name));
    }
}

#[test]
fn the_demo_ends_with_its_standard_input_and_leaves_nothing() {
    let lab = Plan::nodes(0).make();
    let dir = lab.dir.join("demo");
    let mut demo = Command::new(MATRIX)
        .args(["demo", "--nodes", "3", "--size", "256M", "--dir", path(&dir)])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("demo");
    let mounted =
        |n: usize| fs::read_to_string("/proc/self/mounts").is_ok_and(|m| m.contains(&format!("demo/n{n} ")));
    wait_until("three nodes are mounted", SOON, || (1..=3).all(mounted));
    fs::write(dir.join("n1/greeting"), b"hello").expect("write");
    assert_eq!(fs::read(dir.join("n3/greeting")).expect("read"), b"hello");
    let mut input = demo.stdin.take().expect("piped");
    input.write_all(b"\n").expect("input");
    drop(input);
    assert!(demo.wait().expect("demo ends").success());
    assert!(!dir.exists());
    assert!((1..=3).all(|n| !mounted(n)));
}
