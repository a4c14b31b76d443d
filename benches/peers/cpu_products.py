"""Matrix products of PyTorch (oneDNN) on a CPU, in bfloat16 and float32: the peer of
`cargo run --release -p liger-benches --example products`.

    python cpu_products.py [--threads 2] [--seconds 2] [--size 1024x576x1536]
"""

import argparse
import time

import torch

options = argparse.ArgumentParser()
options.add_argument("--threads", type=int, default=2)
options.add_argument("--seconds", type=float, default=2, help="for each product")
options.add_argument("--size", help="one product in bfloat16 alone, as m x k x n")
options = options.parse_args()
torch.set_num_threads(options.threads)
sizes = [options.size] if options.size else ["1024x576x1536", "1024x4096x14336"]
for dtype in (torch.bfloat16,) if options.size else (torch.bfloat16, torch.float32):
    for m, k, n in (map(int, size.split("x")) for size in sizes):
        x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        times = []
        with torch.inference_mode():
            begin = time.time()
            while len(times) < 5 or time.time() - begin < options.seconds:
                start = time.time()
                torch.nn.functional.linear(x, w)
                times.append(time.time() - start)
        middle = sorted(times)[len(times) // 2]
        print(f"linear {m}x{k}x{n} {dtype}: {middle * 1e3:.2f} ms, {2 * m * n * k / middle / 1e9:.0f} GFLOP/s, best {min(times) * 1e3:.2f} ms", flush=True)
