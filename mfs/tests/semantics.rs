//! SEMANTICS.md names tests that exist.

use std::fs;
use std::path::Path;

#[test]
fn every_promise_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("SEMANTICS.md")).unwrap();
    let named: Vec<(&str, &str)> =
        text.split('`').skip(1).step_by(2).filter_map(|word| word.split_once("::")).collect();
    let named: Vec<_> = named.into_iter().filter(|(file, _)| *file != "file").collect();
    assert!(named.len() > 15, "only {} tests are named", named.len());
    for (file, test) in named {
        let source = fs::read_to_string(root.join("tests").join(format!("{file}.rs")))
            .unwrap_or_else(|error| panic!("{file}::{test}: {error}"));
        assert!(source.contains(&format!("fn {test}(")), "{file}::{test} is not there");
    }
}
