"""llama.cpp (by llama-cpp-python, built for the CPU at hand) on a GGUF file: prefill, the middle one of some decoding steps after some
lengths, resident memory.
The peer of `liger bench decode|prefill --device cpu`.

    python llama_cpp_cpu.py MODEL.gguf --lengths 512,8192 [--threads 2] [--flash]
"""

import argparse
import time

import llama_cpp
import numpy

options = argparse.ArgumentParser()
options.add_argument("model")
options.add_argument("--lengths", default="512,8192,32768")
options.add_argument("--threads", type=int, default=2)
options.add_argument("--steps", type=int, default=32)
options.add_argument("--flash", action="store_true", help="flash attention")
options.add_argument("--batch", type=int, default=512)
options = options.parse_args()
lengths = [int(n) for n in options.lengths.split(",")]
model = llama_cpp.Llama(
    options.model,
    n_ctx=max(lengths) + 96,
    n_threads=options.threads,
    n_threads_batch=options.threads,
    n_batch=options.batch,
    n_ubatch=options.batch,
    flash_attn=options.flash,
    verbose=False,
)


def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


ids = numpy.random.default_rng(0).integers(100, 40000, max(lengths) + 32).tolist()
print(f"resident {resident():.0f} MiB before any token")
seen, spent = 0, 0.0
for length in lengths:
    model.n_tokens = seen
    start = time.time()
    model.eval(ids[seen:length])
    spent += time.time() - start
    times = []
    for i in range(options.steps):
        # Never much more than `length` tokens before a step.
        model.n_tokens = length + i % 32
        start = time.time()
        model.eval([ids[length + i % 32]])
        times.append(time.time() - start)
    step = sorted(times)[len(times) // 2]
    seen = length
    print(f"after {length}: prefill {length / spent:.0f} tokens/s, a step {step * 1e3:.2f} ms, resident {resident():.0f} MiB", flush=True)
