"""transformers' `generate` of a Transformer of SmolLM2-135M's shape (random weights, bfloat16), as a server without a server would use it: static
batches, greedy, every text of the same length. The peer of `liger serve` in docs/benchmarks.md.

    python generate.py --batches 1 8 32 64 --tokens 256 [--prompt 16]
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

options = argparse.ArgumentParser()
options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
options.add_argument("--tokens", type=int, default=256)
options.add_argument("--prompt", type=int, default=16)
options = options.parse_args()
config = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=65536,
    rope_theta=100000.0,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).cuda().eval()
for cache in ("dynamic", "static"):
    for batch in options.batches:
        ids = torch.randint(1, 49152, (batch, options.prompt), device="cuda")
        settings = {"do_sample": False, "min_new_tokens": options.tokens, "max_new_tokens": options.tokens, "cache_implementation": cache}
        try:
            with torch.inference_mode():
                model.generate(ids, **settings)
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                start = time.time()
                model.generate(ids, **settings)
                torch.cuda.synchronize()
            seconds, memory = time.time() - start, torch.cuda.max_memory_allocated() / 2**30
            print(f"{batch} x {options.prompt}+{options.tokens}, {cache} cache: {batch * options.tokens / seconds:.0f} tokens/s, {memory:.2f} GiB", flush=True)
        except Exception as e:
            print(f"{batch}, {cache} cache: {type(e).__name__}: {str(e)[:100]}", flush=True)
        model._cache = None
