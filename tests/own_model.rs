//! The example that adapts a model of one's own, started as a user starts it.

use std::env;
use std::path::Path;
use std::process::Command;

#[test]
fn a_model_of_ones_own_is_adapted_saved_loaded_and_merged() {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let output = Command::new(profile.join("examples/own_model")).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let loss = |start: &str| -> f32 {
        let line = stdout.lines().find(|line| line.starts_with(start)).expect(&stdout);
        line.split_once("loss ").unwrap().1.split(' ').next().unwrap().parse().unwrap()
    };
    assert!(loss("pretrained") < 0.2, "{stdout}");
    assert!(loss("after") < 0.5 * loss("before"), "{stdout}");
    for part in ["adapted      7 layers: ", "loaded       the same", "merged       the same"] {
        assert!(stdout.contains(part), "{part} is not in:\n{stdout}");
    }
}
