//! Every case of `tests/golden/fixtures` (or of the folder in `LIGER_GOLDEN_DIR`): logits, branches, states, losses and
//! gradients against the float64 definition in `tests/golden/reference.py`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use liger_cpu::Cpu;
use liger_model::checkpoint::{SafetensorsFiles, SaveFormat, load_adapter, save_model};
use liger_model::{Adapter, Checkpoint, Decoder, Recompute, State, TensorSource};
use liger_tensor::{DType, Ops, Sequences, Tensor};

/// The device and its tolerance: `LIGER_TEST_DEVICE` is `cpu` (or not set), `cpu-bf16`, `cuda` (float32) or `cuda-bf16`.
fn device() -> (Arc<dyn Ops>, DType, f64) {
    let gpu = |dtype| Arc::new(liger_cuda::Cuda::open(0, dtype).unwrap_or_else(|e| panic!("{e}")));
    match std::env::var("LIGER_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => (Arc::new(Cpu::new()), DType::F32, 1e-4),
        Ok("cpu-bf16") => (Arc::new(Cpu::with_bfloat16()), DType::Bf16, 2e-2),
        Ok("cuda") => (gpu(DType::F32), DType::F32, 1e-4),
        Ok("cuda-bf16") => (gpu(DType::Bf16), DType::Bf16, 2e-2),
        Ok(other) => panic!("LIGER_TEST_DEVICE: found `{other}`, expected cpu, cpu-bf16, cuda or cuda-bf16"),
    }
}

fn cases() -> Vec<PathBuf> {
    let folder = match std::env::var_os("LIGER_GOLDEN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/fixtures"),
    };
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut cases: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.join("expected.safetensors").exists()).collect();
    if device().1 == DType::Bf16 {
        // Rounding changes which keys `kept` keeps: a choice, not a number that is a little off. The table of operations checks it
        // in bfloat16, on inputs that bfloat16 holds exactly.
        cases.retain(|folder| !folder.to_string_lossy().contains("liger-kept"));
    }
    cases.sort();
    assert!(!cases.is_empty(), "no fixtures in {}", folder.display());
    cases
}

struct Case {
    name: String,
    folder: PathBuf,
    expected: SafetensorsFiles,
    decoder: Decoder,
    ids: Vec<u32>,
    labels: Vec<i64>,
    batch: usize,
    len: usize,
    tolerance: f64,
}

impl Case {
    fn open(folder: &Path) -> Self {
        let path = folder.join("expected.safetensors");
        let expected = SafetensorsFiles::open_files(folder, vec![path]).unwrap();
        let checkpoint = Checkpoint::open_without_tokenizer(folder).unwrap();
        let (ops, dtype, tolerance) = device();
        let decoder = checkpoint.load(ops, dtype).unwrap();
        let ids = expected.read_i64("input_ids").unwrap().iter().map(|&id| id as u32).collect();
        let labels = expected.read_i64("labels").unwrap();
        let shape = expected.shape("input_ids").unwrap();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        Self {
            name,
            folder: folder.to_owned(),
            expected,
            decoder,
            ids,
            labels,
            batch: shape[0],
            len: shape[1],
            tolerance,
        }
    }

    fn sequences(&self) -> Sequences {
        Sequences::fresh(vec![self.len; self.batch])
    }

    fn download(&self, tensor: &Tensor) -> Vec<f32> {
        self.decoder.ops().download(tensor).unwrap()
    }

    /// Compares with a tensor of the fixture by the norm of the difference.
    fn check(&self, name: &str, found: &[f32]) {
        let expected = self.expected.read(name).unwrap();
        assert_eq!(found.len(), expected.len(), "{}: {name}", self.name);
        let square = |x: f64| x * x;
        let norm: f64 = expected.iter().map(|&y| square(f64::from(y))).sum::<f64>().sqrt();
        let difference: f64 =
            found.iter().zip(&expected).map(|(&x, &y)| square(f64::from(x) - f64::from(y))).sum::<f64>().sqrt();
        let ratio = difference / norm.max(1e-30);
        // More than bfloat16 itself allows to ask for: the definition in PyTorch with nothing but its linear layers in bfloat16 is
        // 1.2e-2 to 2.9e-2 away, on 8 of 14 cases by more than 2e-2. Ours, with all activations in bfloat16, by up to 3.5e-2.
        let gradient = name.starts_with("grad.") && self.tolerance > 1e-3;
        let tolerance = if gradient { 4e-2 } else { self.tolerance };
        assert!(ratio <= tolerance, "{}: {name}: relative error {ratio:.2e}", self.name);
    }

    fn adapter(&self) -> Option<Adapter> {
        let there = self.folder.join("adapter_config.json").exists();
        there.then(|| load_adapter(&self.folder, self.decoder.config(), self.decoder.ops()).unwrap())
    }

    /// Labels of the tokens that follow each row.
    fn next_labels(&self) -> Vec<i64> {
        let mut next = Vec::new();
        for row in self.labels.chunks(self.len) {
            next.extend_from_slice(&row[1..]);
            next.push(-100);
        }
        next
    }

    /// Logits of the whole batch, taken in by pieces of these lengths.
    fn logits_in_pieces(&self, pieces: &[usize], adapter: Option<&Adapter>) -> (Vec<f32>, State) {
        let vocabulary = self.decoder.config().vocab_size;
        let mut state = self.decoder.new_state(self.batch).unwrap();
        let mut logits = vec![0.0; self.ids.len() * vocabulary];
        let mut done = 0;
        for &piece in pieces {
            let mut sequences = Sequences::default();
            let mut ids = Vec::new();
            for slot in 0..self.batch {
                sequences.push(piece, done, slot);
                ids.extend_from_slice(&self.ids[slot * self.len + done..slot * self.len + done + piece]);
            }
            let part = if piece == 1 {
                let tokens: Vec<(usize, u32)> = ids.into_iter().enumerate().collect();
                self.download(self.decoder.step(&mut state, &tokens, adapter).unwrap())
            } else {
                let hidden = self.decoder.forward(&ids, &sequences, Some(&mut state), adapter).unwrap();
                self.download(&self.decoder.logits(&hidden).unwrap())
            };
            for (slot, rows) in part.chunks(piece * vocabulary).enumerate() {
                let at = (slot * self.len + done) * vocabulary;
                logits[at..at + rows.len()].copy_from_slice(rows);
            }
            done += piece;
        }
        assert_eq!(done, self.len);
        (logits, state)
    }
}

#[test]
fn logits_and_loss() {
    for folder in cases() {
        let case = Case::open(&folder);
        let mut branches = Vec::new();
        let mut look = |b| branches.push(b);
        let hidden = case.decoder.forward_with_branches(&case.ids, &case.sequences(), None, None, &mut look).unwrap();
        let mut logits = case.decoder.logits(&hidden).unwrap();
        case.check("logits", &case.download(&logits));
        for b in &branches {
            case.check(&format!("layers.{}.window", b.layer), &case.download(&b.window));
            // What `kept` remembers is part of the window's softmax.
            if let Some(recurrent) = &b.recurrent {
                case.check(&format!("layers.{}.recurrent", b.layer), &case.download(recurrent));
            }
        }
        let next = case.next_labels();
        let losses = case.decoder.ops().cross_entropy(&mut logits, &next, None).unwrap();
        let counted = next.iter().filter(|&&l| l >= 0).count();
        case.check("loss", &[losses.iter().sum::<f32>() / counted as f32]);
    }
}

/// Also where files hold norms less one, as Gemma's do.
#[test]
fn a_saved_model_is_the_same() {
    let names = ["gemma3", "qwen3", "qwen2", "liger-kept-gemma3"];
    for folder in cases().iter().filter(|folder| names.iter().any(|name| folder.ends_with(name))) {
        let case = Case::open(folder);
        let name = &case.name;
        let origin = Checkpoint::open_without_tokenizer(&case.folder).unwrap();
        let folder = tempfile::tempdir().unwrap();
        save_model(folder.path(), &case.decoder, None, &origin, DType::F32, SaveFormat::Liger).unwrap();
        let saved = Checkpoint::open_without_tokenizer(folder.path()).unwrap();
        assert_eq!(saved.config, origin.config, "{name}");
        let (ops, dtype, _) = device();
        let again = Case { decoder: saved.load(ops, dtype).unwrap(), ..case };
        again.check("logits", &again.logits_in_pieces(&[again.len], None).0);
    }
}

#[test]
fn decoding_equals_prefill_and_any_split() {
    for folder in cases() {
        let case = Case::open(&folder);
        let n = case.len;
        let splits = [vec![1; n], vec![n], vec![n / 3, 1, n - n / 3 - 1], vec![n - 1, 1]];
        for pieces in &splits {
            let (logits, state) = case.logits_in_pieces(pieces, None);
            case.check("logits", &logits);
            for layer in 0..case.decoder.config().num_layers {
                let states = state.recurrent(layer);
                for (i, tensor) in states.iter().enumerate() {
                    let suffix = if states.len() > 1 { format!(".{i}") } else { String::new() };
                    case.check(&format!("layers.{layer}.state{suffix}"), &case.download(tensor));
                }
            }
        }
        if let Some(adapter) = case.adapter() {
            let (logits, _) = case.logits_in_pieces(&vec![1; n], Some(&adapter));
            case.check("lora_logits", &logits);
        }
    }
}

#[test]
fn adapter_gradients() {
    let mut checked = 0;
    for (i, folder) in cases().iter().enumerate() {
        let case = Case::open(folder);
        let recompute = if i % 2 == 0 { Recompute::Layer } else { Recompute::None };
        let Some(adapter) = case.adapter() else {
            continue;
        };
        let (decoder, ops) = (&case.decoder, case.decoder.ops());
        let pass = decoder.train_forward(&case.ids, case.sequences(), &adapter, 0, recompute).unwrap();
        let mut logits = decoder.logits(&pass.hidden).unwrap();
        case.check("lora_logits", &case.download(&logits));
        let next = case.next_labels();
        let scale = 1.0 / next.iter().filter(|&&l| l >= 0).count() as f32;
        let losses = ops.cross_entropy(&mut logits, &next, Some(scale)).unwrap();
        case.check("lora_loss", &[losses.iter().sum::<f32>() * scale]);
        let mut dhidden = ops.zeros(pass.hidden.shape()).unwrap();
        decoder.logits_backward(&mut dhidden, &logits).unwrap();
        let mut gradients = adapter.zeros_like(decoder.config(), ops).unwrap();
        decoder.train_backward(pass, &dhidden, &adapter, &mut gradients).unwrap();
        for (name, tensor) in gradients.named() {
            case.check(&format!("grad.{name}"), &case.download(tensor));
            checked += 1;
        }
    }
    assert!(checked > 0);
}
