"""A LoRA step of 1,024 tokens of a Transformer of SmolLM2-135M's shape (random weights) on a CPU, by transformers and PEFT: r8 on q, k, v,
next-token loss, clipping, AdamW. The peer of `liger bench train --device cpu --dtype bf16`; its attention is the plain softmax one, which is
less work than a Liger layer.

    python cpu_train.py [--dtype bfloat16] [--threads 2] [--checkpointing]
"""

import argparse
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

options = argparse.ArgumentParser()
options.add_argument("--dtype", default="bfloat16")
options.add_argument("--threads", type=int, default=2)
options.add_argument("--checkpointing", action="store_true")
options = options.parse_args()
torch.set_num_threads(options.threads)
config = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj"]))
if options.checkpointing:
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
ids = torch.randint(0, 49152, (1, 1024))
times = []
for _ in range(5):
    start = time.time()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    times.append(time.time() - start)
best = min(times[1:])
print(f"{options.dtype}, checkpointing {options.checkpointing}: {best:.3f} s a step, {1024 / best:.0f} tokens/s; steps {', '.join(f'{t:.2f}' for t in times)}")
