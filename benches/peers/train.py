"""Tokens per second and memory of a LoRA step (r 8, alpha 8, on q, k, v; AdamW; clipping) with PyTorch, PEFT and fla.

    python benches/peers/train.py llama-3.2-1b 8 1024

Variants: plain; plain with gradient checkpointing; tuned: fla's fused linear cross-entropy and torch.compile of the
feed-forward layers and norms.
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model

from liger_torch import build, median_seconds


def step_of(model, tuned):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0, fused=True)
    if tuned:
        from fla.modules import FusedLinearCrossEntropyLoss
        fused_loss = FusedLinearCrossEntropyLoss()
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")

    def step():
        if tuned:
            base = model.get_base_model()
            hidden = base.model(input_ids=ids).last_hidden_state
            loss = fused_loss(hidden[:, :-1].reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1), base.lm_head.weight)
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


shape, batch, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
variants = sys.argv[4].split(",") if len(sys.argv) > 4 else ["plain", "checkpointing", "tuned"]
for variant in variants:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = build(shape)
        lora = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"])
        model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
        if variant == "checkpointing":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if variant == "tuned":
            for layer in model.get_base_model().model.layers:
                layer.mlp.compile()
                layer.input_layernorm.compile()
                layer.post_attention_layernorm.compile()
        seconds = median_seconds(step_of(model, variant == "tuned"), 7)
        peak = torch.cuda.max_memory_allocated()
        print(json.dumps({"shape": shape, "variant": variant, "seconds": seconds,
                          "tokens_per_second": batch * length / seconds, "peak_gib": peak / 2**30}), flush=True)
    except torch.OutOfMemoryError:
        print(json.dumps({"shape": shape, "variant": variant, "error": "out of memory"}), flush=True)
    model = None
