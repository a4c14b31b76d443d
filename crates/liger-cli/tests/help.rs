//! The words of the program, held by snapshots.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

#[test]
fn every_verb_has_a_help_with_an_example() {
    for verb in
        ["linearize", "convert", "fuse", "export", "generate", "chat", "eval", "info", "logits", "bench", "completions"]
    {
        let output = common::liger().args([verb, "--help"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && text.contains(&format!("Example: liger {verb} ")), "{text}");
    }
}

#[test]
fn the_first_page() {
    let output = common::liger().arg("--help").output().unwrap();
    insta::assert_snapshot!("help", String::from_utf8(output.stdout).unwrap());
}

#[test]
fn a_closed_pipe_is_no_mistake() {
    let binary = assert_cmd::cargo::cargo_bin("liger");
    let script = format!("set -o pipefail; {} completions bash | head -n 1", binary.display());
    let output = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(
        (output.status.code(), output.stderr.len()),
        (Some(0), 0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
