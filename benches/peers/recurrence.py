"""The chunked recurrence alone: fla's chunk_gla, forward, backward and both, for a shape's heads and 8,192 tokens (or one
longer text).

    python benches/peers/recurrence.py llama-3.2-1b 1024,4096,16384,65536
"""

import json
import sys

import torch
import torch.nn.functional as F
from fla.ops.gla import chunk_gla

from liger_torch import SHAPES, median_seconds

shape, lengths = SHAPES[sys.argv[1]], [int(x) for x in sys.argv[2].split(",")]
heads, kv, dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
for length in lengths:
    batch = max(1, 8192 // length)
    random = lambda h: torch.randn(batch, length, h, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = random(heads).softmax(-1), random(kv), random(kv)
    gate = F.logsigmoid(k.float()) / 16
    k = k.softmax(-1)
    # The kernel wants as many key/value heads as query heads.
    q, k, v, gate = (x.repeat_interleave(heads // x.shape[2], dim=2).detach().requires_grad_() for x in (q, k, v, gate))
    dout = torch.randn_like(v)
    forward = median_seconds(lambda: chunk_gla(q, k, v, gate, scale=1.0), 20)

    def both():
        q.grad = k.grad = v.grad = gate.grad = None
        chunk_gla(q, k, v, gate, scale=1.0)[0].backward(dout)

    total = median_seconds(both, 20)
    print(json.dumps({"length": length, "batch": batch, "forward_ms": forward * 1e3, "both_ms": total * 1e3}), flush=True)
