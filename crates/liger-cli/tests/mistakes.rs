//! What people do wrong: one clear line, exit code 2, nothing half-written.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{failure, liger, write_model, write_recipe};

fn check(dir: &Path, args: &[&str], expected: &str) {
    let mut command = liger();
    command.args(args).current_dir(dir);
    let (error, code) = failure(&mut command, dir);
    assert_eq!(code, Some(2), "{args:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
    assert!(error.starts_with("error: ") && error.contains(expected), "{args:?}: {error}");
}

fn model(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    write_model(&path);
    path
}

fn edit(path: &Path, from: &str, to: &str) {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn models_that_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    check(dir, &["info", "nowhere"], "nowhere: no model here; give a folder with config.json or a .gguf file");
    std::fs::create_dir(dir.join("empty")).unwrap();
    check(dir, &["info", "empty"], "empty: no config.json here");

    let path = model(dir, "arch");
    edit(&path.join("config.json"), "\"llama\"", "\"mamba\"");
    check(
        dir,
        &["info", "arch"],
        "arch/config.json: field `model_type`: found `mamba`, expected llama, mistral, qwen2, qwen3",
    );
    let path = model(dir, "gemma");
    edit(&path.join("config.json"), "\"llama\"", "\"gemma3_text\", \"final_logit_softcapping\": 30.0");
    check(dir, &["info", "gemma"], "gemma/config.json: field `final_logit_softcapping`: found 30, expected null");
    edit(&path.join("config.json"), "\"final_logit_softcapping\": 30.0", "\"query_pre_attn_scalar\": 168");
    check(
        dir,
        &["info", "gemma"],
        "gemma/config.json: field `query_pre_attn_scalar`: found 168, expected head_dim, 16",
    );
    model(dir, "layers");
    let layers = ["convert", "layers", "--softmax-layers", "1,x", "--out", "o"];
    check(dir, &layers, "--softmax-layers: found `1,x`, expected layers with commas between, or none");
    let path = model(dir, "rope");
    edit(&path.join("config.json"), "\"rope_theta\"", "\"rope_scaling\":{\"rope_type\":\"longrope\"},\"rope_theta\"");
    check(
        dir,
        &["info", "rope"],
        "field `rope_scaling.rope_type`: found `longrope`, expected default, linear, llama3 or yarn",
    );
    let path = model(dir, "liger");
    edit(
        &path.join("config.json"),
        "\"rope_theta\"",
        "\"liger\":{\"structure\":\"gla\",\"window\":8,\"sink\":4},\"rope_theta\"",
    );
    check(dir, &["info", "liger"], "field `liger.sink`: found an unknown key, expected one of structure, gate, window");
    let path = model(dir, "gate");
    edit(
        &path.join("config.json"),
        "\"rope_theta\"",
        "\"liger\":{\"structure\":\"hgrn2\",\"window\":8,\"gate\":\"value\"},\"rope_theta\"",
    );
    check(
        dir,
        &["info", "gate"],
        "field `liger.gate`: found value, expected key: only gla's gate can come from elsewhere",
    );
    edit(&path.join("config.json"), "\"value\"", "\"keys\"");
    check(dir, &["info", "gate"], "field `liger.gate`: found `keys`, expected key, query, value, none");
    let path = model(dir, "nojson");
    std::fs::write(path.join("config.json"), "{").unwrap();
    check(dir, &["info", "nojson"], "nojson/config.json: not JSON: EOF");

    let path = model(dir, "cut");
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    std::fs::write(path.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    check(
        dir,
        &["info", "cut"],
        "ends behind the end of the file: the file is cut short or damaged; download it again",
    );
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    check(dir, &["info", "cut"], "cut: no model.safetensors or model.safetensors.index.json here");
    let index = "{\"weight_map\": {\"model.norm.weight\": \"model-00001-of-00002.safetensors\"}}";
    std::fs::write(path.join("model.safetensors.index.json"), index).unwrap();
    check(dir, &["info", "cut"], "model-00001-of-00002.safetensors: no file here; download it again");
    std::fs::write(path.join("model.safetensors.index.json"), index.replace("model-", "../model-")).unwrap();
    check(dir, &["info", "cut"], "field `weight_map`: found `../model-00001-of-00002.safetensors`");

    let path = model(dir, "shape");
    edit(&path.join("config.json"), "\"intermediate_size\":64", "\"intermediate_size\":96");
    check(
        dir,
        &["generate", "shape", "-p", "x"],
        "tensor `model.layers.0.mlp.gate_proj.weight` has shape [64, 32], config.json says [96, 32]",
    );
    let path = model(dir, "dtype");
    let mut bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let header = bytes.windows(5).position(|w| w == b"\"F32\"").unwrap();
    bytes[header + 1..header + 4].copy_from_slice(b"I32");
    std::fs::write(path.join("model.safetensors"), &bytes).unwrap();
    check(dir, &["generate", "dtype", "-p", "x"], "has dtype I32, expected F32, F16 or BF16");
    let path = model(dir, "notok");
    std::fs::remove_file(path.join("tokenizer.json")).unwrap();
    check(
        dir,
        &["generate", "notok", "-p", "x"],
        "notok: no tokenizer.json here; save the model with a fast tokenizer",
    );
}

#[test]
fn damaged_gguf_files() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    write("a.gguf", b"hello");
    check(dir, &["info", "a.gguf"], "a.gguf: not a GGUF file");
    let head = |tensors: u64, pairs: u64| {
        [&b"GGUF"[..], &3u32.to_le_bytes(), &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
    };
    write("b.gguf", &head(u64::MAX, 0));
    check(dir, &["info", "b.gguf"], "18446744073709551615 tensors do not fit in the file");
    write("c.gguf", &head(0, 1)[..20]);
    check(dir, &["info", "c.gguf"], "the file is cut short or damaged");
    let long_key = [&head(0, 1)[..], &u64::MAX.to_le_bytes(), &[0; 64]].concat();
    write("d.gguf", &long_key);
    check(dir, &["info", "d.gguf"], "bytes wanted");
    write("e.gguf", &head(0, 0));
    check(
        dir,
        &["info", "e.gguf"],
        "field `general.architecture`: found `nothing`, expected llama, qwen2, qwen3, gemma3 or liger",
    );
}

#[test]
fn data_and_settings() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    model(dir, "base");
    write_recipe(&dir.join("r.toml"), 2);
    let linearize = |more: &[&str], expected: &str| {
        let args = [&["linearize", "base", "--recipe", "r.toml"], more].concat();
        check(dir, &args, expected);
    };
    std::fs::write(dir.join("bad.jsonl"), "{\"text\": \"a\"}\n{oops\n").unwrap();
    linearize(&["--data", "bad.jsonl", "--out", "o1"], "bad.jsonl: line 2: not JSON");
    std::fs::write(dir.join("blank.jsonl"), "{\"text\": \"a\"}\n\n{\"text\": \"a\"}\n").unwrap();
    linearize(&["--data", "blank.jsonl", "--out", "o2"], "blank.jsonl: line 2: an empty line; expected a JSON object");
    std::fs::write(dir.join("none.jsonl"), "{\"instruction\": \"a\"}\n").unwrap();
    linearize(
        &["--data", "none.jsonl", "--out", "o3"],
        "no record can be used; line 1: an instruction without `output`",
    );
    linearize(&["--data", "missing.jsonl", "--out", "o4"], "missing.jsonl: cannot read");
    linearize(&["--data", "r.toml", "--out", "o5"], "r.toml: unknown kind of file");
    linearize(&["--structure", "lstm", "--out", "o6"], "recipe: `liger.structure`: found `lstm`, expected gla, hgrn2");
    // No machine has so many: the libraries are missing, or the hundredth GPU is.
    linearize(&["--device", "cuda:99", "--out", "o7"], "--device cuda:99: ");
    linearize(&["--device", "tpu", "--out", "o8"], "--device: found `tpu`, expected auto, cpu, cuda or cuda:N");
    check(
        dir,
        &["linearize", "base", "--recipe", "papr"],
        "papr: no such recipe; give a TOML file or one of default, paper, quickstart",
    );
    edit(&dir.join("r.toml"), "rank = 2", "rank = 2\nrnak = 3");
    check(dir, &["linearize", "base", "--recipe", "r.toml"], "r.toml: line 8: unknown field `rnak`");

    std::fs::create_dir(dir.join("full")).unwrap();
    std::fs::write(dir.join("full/precious.txt"), "mine").unwrap();
    check(dir, &["convert", "base", "--out", "full"], "full: the folder is not empty; give another one, or --force");
    assert_eq!(std::fs::read_dir(dir.join("full")).unwrap().count(), 1);
    check(dir, &["generate", "base", "-p", "x", "--top-p", "2"], "--top-p: found 2, expected above 0 and at most 1");
    check(dir, &["generate", "base", "-p", "", "--raw"], "--prompt: it is empty");
    check(dir, &["bench", "decode", "--shape", "gpt-9"], "--shape: found `gpt-9`, expected one of tiny, smollm2-135m");
}

#[test]
fn tokens_adapters_and_contexts() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let base = model(dir, "base");
    std::fs::write(dir.join("ids.json"), "[[1, 2, 999]]").unwrap();
    let logits = ["logits", "base", "--input-ids", "ids.json", "--out", "l.safetensors"];
    check(dir, &logits, "token id 999 is out of range: the model has 260 tokens");
    assert!(!dir.join("l.safetensors").exists());
    std::fs::write(dir.join("ids.json"), "[[1, 2], [3]]").unwrap();
    check(dir, &logits, "ids.json: expected at least one list, all of one length above 0");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/fixtures/liger-gla");
    check(
        dir,
        &["generate", "base", "-p", "x", "--adapter", fixture.to_str().unwrap()],
        "an adapter for another model",
    );
    check(dir, &["generate", "base", "-p", "x", "--adapter", "base"], "base: no adapter_config.json here");

    // A teacher past its context is refused; its Liger form goes on.
    edit(&base.join("config.json"), "4096", "64");
    let long = "x".repeat(100);
    check(dir, &["generate", "base", "--raw", "-p", &long], "100 tokens are more than this model's context of 64");
    let ok =
        |args: &[&str]| assert!(liger().args(args).current_dir(dir).output().unwrap().status.success(), "{args:?}");
    ok(&["convert", "base", "--window", "8", "--out", "form"]);
    ok(&["generate", "form", "--raw", "-p", &long, "-n", "40"]);
    check(dir, &["convert", "form", "--out", "again"], "form: already a Liger model");
    let quantized = |out: &'static str| ["convert", "form", "--quantize", "q8_0", "--out", out];
    check(dir, &quantized("q"), "--out q: expected a name that ends in .gguf");
    check(dir, &quantized("nowhere/q.gguf"), "--out nowhere/q.gguf: expected a file in a folder that is there");
    ok(&quantized("q.gguf"));
    check(dir, &quantized("q.gguf"), "q.gguf: the file is there already; give another one, or --force");
    check(
        dir,
        &["generate", "q.gguf", "-p", "x", "--device", "cuda", "--dtype", "q8_0"],
        "--dtype: quantised weights are for the CPU; use bf16 on a GPU, or --device cpu",
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_and_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    model(dir, "base");
    // Every write to this file fails as a full disk does.
    let args = ["logits", "base", "--input-ids", "ids.json", "--out", "/dev/full/l.safetensors"];
    std::fs::write(dir.join("ids.json"), "[[1, 2]]").unwrap();
    let mut command = liger();
    command.args(args).current_dir(dir);
    let (error, code) = failure(&mut command, dir);
    assert_eq!(code, Some(2));
    assert!(error.contains("cannot write"), "{error}");
    // A limit on the size of files stands for a disk that fills up halfway.
    let script = format!(
        "ulimit -f 40; trap '' XFSZ; exec {} convert base --out form",
        assert_cmd::cargo::cargo_bin("liger").display()
    );
    let output = std::process::Command::new("bash").args(["-c", &script]).current_dir(dir).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.starts_with("error: form/model.safetensors: cannot write: File too large"), "{error}");
    assert_eq!(std::fs::read_dir(dir.join("form")).unwrap().count(), 0, "nothing half-written");
}

#[test]
fn tasks_that_cannot_be_scored() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    model(dir, "m");
    let eval = |task: &str, expected: &str| check(dir, &["eval", "m", "--tasks", task, "--data-dir", "."], expected);
    eval("pica", "no task `pica`; did you mean `piqa`?");
    eval("piqa", ".: no piqa.jsonl or piqa.jsonl.zst here; put the records of piqa there");
    std::fs::write(dir.join("mine.toml"), "data = \"mine\"\nprompt = \"x\"\n").unwrap();
    eval("mine.toml", "mine.toml: line 2: unknown field `prompt`");
    std::fs::write(dir.join("piqa.jsonl"), "{\"goal\": \"g\"}\n").unwrap();
    eval("piqa", "piqa.jsonl: line 1: ");
    check(dir, &["eval", "m", "--tasks", "passkey", "--out", "none/run.json"], "--out: no folder none; make it first");
    check(dir, &["eval", "m"], "nothing to score: give --tasks, --text or both");
    check(
        dir,
        &["eval", "m", "--tasks", "passkey", "--variants", "no-recurrence"],
        "--variants: `no-recurrence` is for Liger models",
    );
    // The system's reason is said once.
    check(
        dir,
        &["eval", "m", "--text", "none.txt"],
        "error: none.txt: cannot read: No such file or directory (os error 2)\n",
    );
    std::fs::write(dir.join("run.json"), "{\"liger_eval\": 1}").unwrap();
    check(dir, &["report", "run.json", "--out", "page"], "run.json: not a file of `liger eval --out`: missing field");
}

#[test]
fn servers_that_cannot_be_started() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    model(dir, "m");
    check(dir, &["serve", "m", "--slots", "0"], "--slots: found 0, expected at least 1");
    check(dir, &["serve", "m", "--api-key", ""], "--api-key: it is empty");
    check(dir, &["serve", "m", "--host", "0.0.0.0"], "--host 0.0.0.0: others than this machine could use it");
    check(dir, &["serve", "nothing"], "nothing: no model here");
    // The port is taken.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let expected = format!("error: 127.0.0.1:{port}: Address already in use");
    check(dir, &["serve", "m", "--port", &port.to_string(), "--device", "cpu"], &expected);
}
