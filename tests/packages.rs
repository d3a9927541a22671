//! Each crate's package is whole by itself: Cargo puts nothing into it from above the crate's folder.

use std::fs;
use std::path::Path;

#[test]
fn every_crate_has_a_readme_and_the_licences() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read =
        |path: &Path| fs::read_to_string(path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let crates = fs::read_dir(root.join("crates")).unwrap();
    for folder in crates.map(|entry| entry.unwrap().path()) {
        for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
            assert_eq!(read(&folder.join(licence)), read(&root.join(licence)), "{folder:?}");
        }
        let name = folder.file_name().unwrap().to_str().unwrap();
        assert!(read(&folder.join("README.md")).starts_with(&format!("# {name}\n")), "{name}");
        let manifest = read(&folder.join("Cargo.toml"));
        for field in ["description", "keywords", "categories", "readme", "include"] {
            assert!(manifest.contains(&format!("\n{field} = ")), "{name} has no {field}");
        }
    }
}
