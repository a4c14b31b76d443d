"""Milliseconds of a decoding step with PyTorch and fla: a window cache of constant size and fused_recurrent_gla.

    python benches/peers/decode.py llama-3.2-1b 1,16
"""

import json
import sys

import torch

from liger_torch import SINKS, WINDOW, WindowCache, build, median_seconds

shape, batches = sys.argv[1], [int(x) for x in sys.argv[2].split(",")]
model = build(shape).eval()
config = model.config
for batch in batches:
    for layer in model.model.layers:
        cache = layer.self_attn.cache = WindowCache()
        size = (batch, config.num_key_value_heads, SINKS + WINDOW, config.head_dim)
        cache.keys, cache.values = torch.randn(size, device="cuda").bfloat16(), torch.randn(size, device="cuda").bfloat16()
        cache.state = torch.randn(batch, config.num_attention_heads, config.head_dim, config.head_dim, device="cuda")
    ids = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    position = torch.full((batch, 1), 1024, device="cuda")

    @torch.no_grad()
    def step():
        ids.copy_(model(input_ids=ids, position_ids=position).logits[:, -1:].argmax(-1))

    seconds = median_seconds(step, 30)
    print(json.dumps({"shape": shape, "batch": batch, "milliseconds": seconds * 1e3}), flush=True)
