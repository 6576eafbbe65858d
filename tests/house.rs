//! The layers: a crate depends only on crates to its right, and nothing depends on the binary.

use std::collections::BTreeMap;
use std::process::Command;

/// From the top to the bottom; a crate may use those after it.
const ORDER: [&str; 6] = ["matrix", "mfs", "lcl", "dlm", "membership", "storage-control"];

/// Crates that only the composition root may use: what talks to other nodes or to people.
const ROOT_ONLY: [&str; 4] = ["rustls", "tokio-rustls", "clap", "socket2"];

/// What a crate uses.
struct Use {
    name: String,
    for_tests: bool,
    features: Vec<String>,
}

fn dependencies() -> BTreeMap<String, Vec<Use>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .output()
        .expect("cargo metadata");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_string();
    let list = |value: &serde_json::Value| value.as_array().cloned().unwrap_or_default();
    let used = |d: &serde_json::Value| Use {
        name: text(&d["name"]),
        for_tests: d["kind"] == "dev",
        features: list(&d["features"]).iter().map(text).collect(),
    };
    let packages = list(&metadata["packages"]);
    packages.iter().map(|p| (text(&p["name"]), list(&p["dependencies"]).iter().map(used).collect())).collect()
}

#[test]
fn every_crate_depends_only_to_its_right() {
    let place = |name: &str| ORDER.iter().position(|o| *o == name);
    let all = dependencies();
    assert_eq!(all.len(), ORDER.len(), "a new crate must be given its place: {:?}", all.keys());
    for (name, uses) in &all {
        let own = place(name).unwrap_or_else(|| panic!("{name} has no place in the order"));
        for used in uses {
            if let Some(other) = place(&used.name) {
                assert!(other > own, "{name} uses {}, which is not to its right in {ORDER:?}", used.name);
            }
        }
    }
}

#[test]
fn no_layer_below_the_root_brings_a_runtime_or_a_socket() {
    for (name, uses) in dependencies().iter().filter(|(name, _)| *name != ORDER[0]) {
        for used in uses.iter().filter(|used| !used.for_tests) {
            assert!(!ROOT_ONLY.contains(&used.name.as_str()), "{name} uses {}: only the root may", used.name);
            let runtime = used.name == "tokio" && used.features.iter().any(|f| f != "sync");
            assert!(
                !runtime,
                "{name} uses tokio for more than its runtime-free synchronisation: {:?}",
                used.features
            );
        }
    }
}
