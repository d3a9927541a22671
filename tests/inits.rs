//! The example that compares starting values, started as a user starts it, with almost no steps.

use std::env;
use std::path::Path;
use std::process::Command;

#[test]
fn every_start_trains_and_begins_as_the_base() {
    let test = env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    let output = Command::new(profile.join("examples/inits"))
        .args(["--steps", "2", "--seeds", "1", "--rates", "0.000001"])
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let before = stdout.lines().next().and_then(|line| line.split(' ').nth(3)).expect(&stdout);
    let before: f64 = before.parse().unwrap();
    let rows = stdout.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| |"));
    let losses: Vec<f64> =
        rows.map(|row| row.split('|').nth(2).unwrap().trim().parse().unwrap()).collect();
    assert_eq!(losses.len(), 2 * 7, "{stdout}");
    for loss in losses {
        assert!((loss - before).abs() < 0.01, "{loss}, {before} before:\n{stdout}");
    }
}
