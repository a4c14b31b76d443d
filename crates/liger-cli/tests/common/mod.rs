//! A tiny model on disk, made in the test, and the real binary.

#![allow(dead_code)] // each test file uses its own part

use std::path::Path;

use assert_cmd::Command;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

pub const VOCABULARY: usize = 260;

pub fn liger() -> Command {
    let mut command = Command::cargo_bin("liger").unwrap();
    command.env("RAYON_NUM_THREADS", "2");
    command
}

/// Byte-level tokens without merges, and the marks of a chat.
fn tokenizer() -> Value {
    // GPT-2's printable stand-ins for bytes.
    let mut next = 256;
    let mut vocab = serde_json::Map::new();
    for byte in 0..256u32 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let stand_in = if printable { byte } else { next };
        next += u32::from(!printable);
        vocab.insert(char::from_u32(stand_in).unwrap().to_string(), json!(byte));
    }
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(i, token)| {
            json!({"id": 256 + i, "content": token, "special": true, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        })
        .collect();
    for (i, token) in special.iter().enumerate() {
        vocab.insert((*token).into(), json!(256 + i));
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

/// Writes a llama of two layers with fixed random weights.
pub fn write_model(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let (d, ff, heads, kv, head) = (32, 64, 4, 2, 16);
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": d,
        "intermediate_size": ff, "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": head, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": true, "bos_token_id": 256, "eos_token_id": 258,
    });
    let mut shapes =
        vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, d]), ("model.norm.weight".into(), vec![d])];
    for layer in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![d]),
            ("post_attention_layernorm", vec![d]),
            ("self_attn.q_proj", vec![heads * head, d]),
            ("self_attn.k_proj", vec![kv * head, d]),
            ("self_attn.v_proj", vec![kv * head, d]),
            ("self_attn.o_proj", vec![d, heads * head]),
            ("mlp.gate_proj", vec![ff, d]),
            ("mlp.up_proj", vec![ff, d]),
            ("mlp.down_proj", vec![d, ff]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let count = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..count).map(|_| if shape.len() == 1 { 1.0 } else { random() }).collect();
            (name, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views: Vec<_> = data
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()))
        .collect();
    std::fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let template = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let tokenizer_config = json!({"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": template});
    std::fs::write(folder.join("tokenizer_config.json"), tokenizer_config.to_string()).unwrap();
}

/// A recipe of a few steps.
pub fn write_recipe(path: &Path, steps: usize) {
    let recipe = format!(
        "[liger]\nstructure = \"gla\"\nwindow = 16\nsinks = 2\n\n[lora]\nrank = 2\nalpha = 4.0\ntargets = [\"q_proj\", \
         \"k_proj\", \"v_proj\", \"o_proj\"]\n\n[data]\nlength = 64\nreset_at_documents = false\nloss_on = \
         \"all\"\ntemplate = \"chat\"\n\n[train]\nobjective = \"distillation\"\ntokens = {}\nbatch = 1\nlearning_rate = \
         1e-2\nschedule = \"cosine\"\nclip = 1.0\nvalidate_every = 2\ncheckpoint_every = 2\n",
        64 * steps
    );
    std::fs::write(path, recipe).unwrap();
}

/// Standard error and exit code, with the test's folder replaced.
pub fn failure(command: &mut Command, folder: &Path) -> (String, Option<i32>) {
    let output = command.output().unwrap();
    let folder = folder.to_string_lossy().into_owned();
    let text = String::from_utf8_lossy(&output.stderr).replace(&folder, "DIR");
    (text, output.status.code())
}
