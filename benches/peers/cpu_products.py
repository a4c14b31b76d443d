"""Matrix products of PyTorch (oneDNN) on a CPU, in bfloat16 and float32: the peer of
`cargo run --release -p liger-benches --example products`.

    python cpu_products.py [--threads 2] [--seconds 2] [--size 1024x576x1536 [--packed]]

`packed` is oneDNN's product with weights that were put into its own order before, as `torch.compile` does when it freezes a model.
"""

import argparse
import time

import torch

options = argparse.ArgumentParser()
options.add_argument("--threads", type=int, default=2)
options.add_argument("--seconds", type=float, default=2, help="for each product")
options.add_argument("--size", help="one product in bfloat16 alone, as m x k x n")
options.add_argument("--packed", action="store_true", help="that product with packed weights")
options = options.parse_args()
torch.set_num_threads(options.threads)
sizes = [options.size] if options.size else ["1024x576x1536", "1024x4096x14336"]


def measure(name, sizes, product):
    m, k, n = sizes
    times = []
    begin = time.time()
    while len(times) < 5 or time.time() - begin < options.seconds:
        start = time.time()
        product()
        times.append(time.time() - start)
    middle = sorted(times)[len(times) // 2]
    rate = 2 * m * n * k / middle / 1e9
    print(f"linear {m}x{k}x{n} {name}: {middle * 1e3:.2f} ms, {rate:.0f} GFLOP/s, best {min(times) * 1e3:.2f} ms", flush=True)


with torch.inference_mode():
    for dtype in (torch.bfloat16,) if options.size else (torch.bfloat16, torch.float32):
        for m, k, n in (map(int, size.split("x")) for size in sizes):
            x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            if not options.packed:
                measure(dtype, (m, k, n), lambda: torch.nn.functional.linear(x, w))
            if dtype == torch.bfloat16 and (options.packed or not options.size):
                packed = torch.ops.mkldnn._reorder_linear_weight(w, m)
                product = torch.ops.mkldnn._linear_pointwise
                measure(f"{dtype} packed", (m, k, n), lambda: product(x, packed, None, "none", [], ""))
