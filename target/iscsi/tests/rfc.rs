//! RFC7143.md names tests for each section: they must exist.
#![allow(clippy::unwrap_used, reason = "a test, where a panic is a failure")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[test]
fn every_named_test_exists() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(here.join("RFC7143.md")).unwrap();
    let named = text
        .split('`')
        .skip(1)
        .step_by(2)
        .filter_map(|word| word.split_once("::"));
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    let mut count = 0;
    for (file, test) in named.filter(|(file, _)| *file != "common" && *file != "file") {
        let source = files.entry(file.to_owned()).or_insert_with(|| {
            let places = [here.join("tests"), here.join("../../tests/tests")];
            let found: String = places.iter().map(|place| sources(place, file)).collect();
            assert!(!found.is_empty(), "no test file {file}.rs");
            found
        });
        assert!(
            source.contains(&format!("fn {test}(")),
            "{file}.rs has no test {test}"
        );
        count += 1;
    }
    assert!(
        count > 80,
        "only {count} tests are named: is the table still there?"
    );
}

/// The file of this name, or the files of the directory of this name.
fn sources(place: &Path, name: &str) -> String {
    if let Ok(source) = fs::read_to_string(place.join(format!("{name}.rs"))) {
        return source;
    }
    let files = fs::read_dir(place.join(name)).into_iter().flatten();
    files
        .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
        .collect()
}
