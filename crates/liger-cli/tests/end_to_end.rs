//! The main job on a tiny model, through the real binary.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{failure, liger, write_model, write_recipe};
use serde_json::Value;

fn run(args: &[&str], folder: &Path) -> String {
    let output = liger().args(args).current_dir(folder).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn linearize_then_use_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write_model(&dir.join("base"));
    write_recipe(&dir.join("r.toml"), 6);
    let args = ["linearize", "base", "--recipe", "r.toml", "--data", "self", "--eval-pieces", "1", "--out", "run"];
    let shown = run(&args, dir);
    // Own text is measured up to twice the length of a training row.
    for part in
        ["Perplexity by position", "window 16 + 4 sinks", "untrained", "tuned", "Teacher:", "Student:", "64-256"]
    {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    for file in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "report.md",
        "loss.svg",
        "perplexity.svg",
        "memory.svg",
        "metrics.jsonl",
        "recipe.toml",
    ] {
        assert!(dir.join("run").join(file).exists(), "{file}");
    }
    assert_eq!(std::fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap().lines().count(), 6);
    let config: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("run/config.json")).unwrap()).unwrap();
    assert_eq!(config["liger"]["structure"], "gla");

    // What was written for other settings is not gone on with.
    let (error, code) = failure(liger().args(args).args(["--resume", "--tokens", "640"]).current_dir(dir), dir);
    assert!(code == Some(2) && error.contains("self.json: found 8 conversations, these settings take 12"), "{error}");

    // The fused model and base + adapter in the Liger form say the same.
    run(&["convert", "base", "--structure", "gla", "--window", "16", "--sinks", "2", "--out", "form"], dir);
    run(&["fuse", "form", "--adapter", "run/adapter", "--out", "fused"], dir);
    let generate = |model: &str, more: &[&str]| {
        run(&[&["generate", model, "--prompt", "Hello", "-n", "12", "--json"], more].concat(), dir)
    };
    let tokens = |text: String| serde_json::from_str::<Value>(&text).unwrap()["tokens"].clone();
    let fused = tokens(generate("run", &[]));
    assert_eq!(fused, tokens(generate("fused", &[])));
    assert_eq!(fused, tokens(generate("form", &["--adapter", "run/adapter"])));
    // Sampling follows its seed.
    let sampled = |seed: &str| tokens(generate("run", &["--temperature", "1", "--top-p", "0.9", "--seed", seed]));
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));

    // A text in two halves through a saved state is the text in one.
    run(&["generate", "run", "--raw", "--prompt", "abcdefgh", "-n", "1", "--save-state", "s.safetensors"], dir);
    let info: Value = serde_json::from_str(&run(&["info", "run", "--json"], dir)).unwrap();
    let states = info["state"].as_array().unwrap();
    assert_eq!(states[0]["bytes"], states[3]["bytes"]);
    assert!(
        run(&["generate", "run", "--raw", "--prompt", "xyz", "-n", "3", "--load-state", "s.safetensors"], dir)
            .ends_with('\n')
    );

    let mut chat = liger();
    chat.args(["chat", "run", "-n", "8"]).current_dir(dir).write_stdin("Hi\nAnd you?\n/reset\nAgain\n/quit\n");
    let output = chat.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let bench = run(&["bench", "train", "--model", "base", "--lengths", "64", "--repeat", "1"], dir);
    assert!(bench.contains("share of the products'"), "{bench}");
    // A model is measured as it is, unless told otherwise.
    run(&["convert", "base", "--structure", "gsa", "--out", "gsa"], dir);
    for (more, structure) in [(&[][..], "gsa"), (&["--structure", "hgrn2"][..], "hgrn2")] {
        let bench = ["bench", "decode", "--model", "gsa", "--lengths", "8", "--repeat", "1", "--json"];
        let found: serde_json::Value = serde_json::from_str(&run(&[&bench[..], more].concat(), dir)).unwrap();
        assert_eq!(found["structure"], structure);
    }
}

#[test]
fn logits_by_prefill_and_by_decoding_agree() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/fixtures/liger-gsa");
    let fixture = fixture.to_str().unwrap();
    std::fs::write(dir.join("ids.json"), "[[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]").unwrap();
    let logits = |mode: &str, dtype: &str| {
        let args =
            ["logits", fixture, "--input-ids", "ids.json", "--out", "l.safetensors", "--mode", mode, "--dtype", dtype];
        let args = [&args[..], &["--adapter", fixture]].concat();
        run(&args, dir);
        let bytes = std::fs::read(dir.join("l.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor("logits").unwrap();
        assert_eq!(view.shape(), [2, 8, 97]);
        view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>()
    };
    let exact = logits("prefill", "f32");
    for (mode, dtype, tolerance) in [("decode", "f32", 1e-4), ("prefill", "bf16", 3e-2)] {
        let found = logits(mode, dtype);
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let difference: Vec<f32> = found.iter().zip(&exact).map(|(a, b)| a - b).collect();
        let ratio = norm(&difference) / norm(&exact);
        assert!(ratio < tolerance, "{mode} {dtype}: {ratio:.1e}");
    }
}

#[test]
fn quantised_files_are_written_and_used_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write_model(&dir.join("base"));
    std::fs::write(dir.join("ids.json"), "[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]").unwrap();
    run(&["convert", "base", "--structure", "gla", "--window", "4", "--sinks", "2", "--out", "form"], dir);
    let form = ["--structure", "gla", "--window", "4", "--sinks", "2"];
    run(&[&["convert", "base", "--quantize", "q8_0", "--out", "8.gguf"][..], &form].concat(), dir);
    // A file that is quantised already keeps its form.
    run(&["convert", "8.gguf", "--quantize", "q4_1", "--out", "4.gguf"], dir);
    let size = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
    assert!(size("4.gguf") < size("8.gguf") && size("8.gguf") < size("form/model.safetensors"));
    let logits = |model: &str, mode: &str, more: &[&str]| {
        let args = ["logits", model, "--input-ids", "ids.json", "--out", "l.safetensors", "--mode", mode];
        run(&[&args[..], more].concat(), dir);
        let bytes = std::fs::read(dir.join("l.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("logits").unwrap().data().to_vec();
        data.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect::<Vec<_>>()
    };
    let off = |found: &[f64], exact: &[f64]| {
        let norm = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
        found.iter().zip(exact).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt() / norm
    };
    let exact = logits("form", "prefill", &[]);
    for (file, dtype, bound) in [("8.gguf", "q8_0", 4e-2), ("4.gguf", "q4_1", 0.6)] {
        let packed = logits(file, "prefill", &[]);
        assert!(off(&packed, &exact) < bound, "{file}: {:.1e}", off(&packed, &exact));
        // Unpacked to float32, read with 8 or 4 bits, or decoded token by token, the weights are the same.
        assert!(off(&logits(file, "prefill", &["--dtype", "f32"]), &packed) < 1e-3, "{file}");
        assert!(off(&logits(file, "decode", &[]), &packed) < 1e-3, "{file}");
        // Asked for as they are, they are not rounded again.
        assert_eq!(logits(file, "prefill", &["--dtype", dtype]), packed, "{file}");
    }
    let eight = logits("8.gguf", "prefill", &[]);
    assert!(off(&logits("form", "prefill", &["--dtype", "q8_0"]), &eight) < 1e-6);
    assert!(run(&["info", "4.gguf"], dir).contains("Liger gla: window 4, 2 sinks"));
    assert_eq!(run(&["generate", "8.gguf", "-p", "Hello", "-n", "4", "--json"], dir).lines().count(), 1);
    let tuned = ["linearize", "8.gguf", "--out", "run"];
    let (said, code) = failure(liger().args(tuned).current_dir(dir), dir);
    assert!(code == Some(2) && said.contains("8.gguf"), "a Liger model is not converted again: {said}");
}

#[test]
fn the_authors_format_is_written_and_read() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write_model(&dir.join("base"));
    run(&["convert", "base", "--window", "65", "--out", "form"], dir);
    run(&["export", "form", "--format", "authors", "--out", "authors"], dir);
    let config: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("authors/config.json")).unwrap()).unwrap();
    assert_eq!((config["model_type"].as_str(), config.get("liger")), (Some("liger_gla"), None));
    let text = |model: &str| run(&["generate", model, "--prompt", "Hi", "-n", "10", "--json"], dir);
    let tokens = |text: String| serde_json::from_str::<Value>(&text).unwrap()["tokens"].clone();
    assert_eq!(tokens(text("authors")), tokens(text("form")));
    run(&["convert", "base", "--out", "other"], dir);
    let mut export = liger();
    export.args(["export", "other", "--format", "authors", "--out", "x"]).current_dir(dir);
    let (error, code) = failure(&mut export, dir);
    assert_eq!(code, Some(2));
    assert!(error.contains("the authors' format cannot express"), "{error}");
    assert!(!dir.join("x").exists(), "nothing half-written");
}

/// Ctrl-C saves and exits with 130; `--resume` ends with the very adapter of an unbroken run.
#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write_model(&dir.join("base"));
    write_recipe(&dir.join("r.toml"), 400);
    let text: String =
        (0..40).map(|i| format!("{{\"text\": \"{}\"}}\n", "the quick brown fox ".repeat(3 + i % 5))).collect();
    std::fs::write(dir.join("d.jsonl"), text).unwrap();
    let args =
        ["linearize", "base", "--recipe", "r.toml", "--data", "d.jsonl", "--eval-pieces", "1", "--device", "cpu"];
    let mut child = Command::new(assert_cmd::cargo::cargo_bin("liger"))
        .args([&args[..], &["--out", "cut"]].concat())
        .current_dir(dir)
        .env("RAYON_NUM_THREADS", "2")
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let metrics = dir.join("cut/metrics.jsonl");
    for _ in 0..600 {
        if std::fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() >= 3) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let lines: Vec<String> = BufReader::new(child.stderr.take().unwrap()).lines().map(|l| l.unwrap()).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{lines:?}");
    let last = lines.last().unwrap();
    assert!(
        last.starts_with("interrupted: step ") && last.ends_with("the same command with --resume goes on"),
        "{last}"
    );
    run(&[&args[..], &["--out", "cut", "--resume"]].concat(), dir);
    run(&[&args[..], &["--out", "whole"]].concat(), dir);
    let adapter = |out: &str| std::fs::read(dir.join(out).join("adapter/adapter_model.safetensors")).unwrap();
    assert_eq!(adapter("cut"), adapter("whole"));
}

#[test]
fn a_benchmark_is_scored() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write_model(&dir.join("m"));
    let records = "{\"goal\": \"g\", \"sol1\": \"a\", \"sol2\": \"bb\", \"label\": 0}\n".repeat(3);
    std::fs::write(dir.join("piqa.jsonl"), records).unwrap();
    let args =
        ["eval", "m", "--tasks", "piqa", "--data-dir", ".", "--limit", "2", "--json", "--log-samples", "log.jsonl"];
    let args = [&args[..], &["--no-cache"]].concat();
    let output = liger().args(args).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let task = &result["models"][0]["tasks"][0];
    assert_eq!((task["task"].as_str(), task["items"].as_u64()), (Some("piqa"), Some(2)));
    let log = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let first: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    let logs: Vec<f64> = first["log_likelihoods"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let right = f64::from(u8::from(logs[0] > logs[1]));
    assert_eq!(task["scores"][0]["value"].as_f64(), Some(right));
}
