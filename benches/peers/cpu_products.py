"""Matrix products of PyTorch (oneDNN) on a CPU, in bfloat16 and float32: the peer of
`cargo run --release -p liger-benches --example products`.

    python cpu_products.py [--threads 2]
"""

import argparse
import time

import torch

options = argparse.ArgumentParser()
options.add_argument("--threads", type=int, default=2)
torch.set_num_threads(options.parse_args().threads)
for dtype in (torch.bfloat16, torch.float32):
    for m, k, n in ((1024, 576, 1536), (1024, 4096, 14336)):
        x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        times = []
        with torch.inference_mode():
            begin = time.time()
            while len(times) < 5 or time.time() - begin < 2:
                start = time.time()
                torch.nn.functional.linear(x, w)
                times.append(time.time() - start)
        middle = sorted(times)[len(times) // 2]
        print(f"linear {m}x{k}x{n} {dtype}: {middle * 1e3:.2f} ms, {2 * m * n * k / middle / 1e9:.0f} GFLOP/s, best {min(times) * 1e3:.2f} ms", flush=True)
