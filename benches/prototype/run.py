"""Tunes forms of attention one after the other and measures them.

    python run.py DATA MODEL OUT.jsonl PLAN [SECONDS]

DATA is a folder written by data.py, MODEL a Hugging Face folder, PLAN a file of one JSON object a line: name, v (the form, see
variants.py), what (lora, loraall, mixer, all), rank, lr, batch, length, tokens, data (pool to share)."""

import copy
import json
import math
import os
import sys
import time

import numpy as np
import torch

from variants import Model, by_position, dev, load, recall, tune

torch.backends.cuda.matmul.allow_tf32 = True
torch.set_float32_matmul_precision("high")
data, model_dir, out, plan = sys.argv[1:5]
budget = float(sys.argv[5]) if len(sys.argv) > 5 else 1e9
start = time.time()
gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
f = open(out, "a")


def say(s):
    print(f"[{gpu} {time.time() - start:.0f}s] {s}", flush=True)


ld = lambda n: np.load(f"{data}/{n}.npy")
small = dev == "cpu"
books = ld("books")[: (2 if small else 40) * 2048].reshape(-1, 2048)
long8 = ld("books_long").reshape(-1)[: 10 * 8192].reshape(-1, 8192)
long32 = ld("books_long")[: 2 * 32768].reshape(2, 32768)
lam = json.load(open(f"{data}/lambada.json"))[::10][: 10 if small else 500]
pk = json.load(open(f"{data}/passkey.json"))
hf = load(model_dir)
teacher = Model(hf)
for p in hf.parameters():
    p.requires_grad_(False)
pools = {}


def pool(mix, seed):
    g = np.random.default_rng(seed)
    parts = []
    for name, share in mix.items():
        if name not in pools:
            pools[name] = ld(name)
        p = pools[name]
        parts.append(p[g.permutation(len(p))[: max(1, int(share * 10000))]] if share < 1 else p)
    return np.concatenate(parts)


# moments of the teacher's rotated queries, for scores of keys
def calibrate():
    teacher.stats = [[0, 0, 0] for _ in hf.model.layers]
    with torch.no_grad(), torch.autocast(dev, torch.bfloat16):
        for r in ld("ctx")[: 2 if small else 16]:
            teacher.hidden(torch.tensor(r[None].astype("int64"), device=dev)[:, : 256 if small else 2048])
    st = teacher.stats
    teacher.stats = None
    return [(s / n, q / n - (s / n) ** 2) for s, q, n in st]


stats = calibrate()


def measure(m, extra=False):
    r = {}
    m.eval()
    if m.v is not None:
        r["book"] = by_position(m, teacher, books)
    else:
        r["book"] = by_position(m, m, books)
    if extra:
        r["book8k"] = by_position(m, teacher, long8, batch=1)
    if extra == 2:
        r["book32k"] = by_position(m, teacher, long32, batch=1)
    acc, ll = recall(m, lam, 50)
    r["lambada"] = [acc, math.exp(-ll)]
    for L in pk:
        if small and L != "512":
            continue
        r["pk" + L] = recall(m, [tuple(x) for x in pk[L]][: 2 if small else 30], 10)
    return r


def short(r):
    b = " ".join(f"{p:.1f}/{k:.3f}" for p, k in r["book"])
    return (
        b
        + f" | lam {r['lambada'][1]:.1f} {r['lambada'][0] * 100:.1f}"
        + "".join(f" | {k} {v[0] * 100:.0f}% {v[1]:.1f}" for k, v in r.items() if k.startswith("pk"))
        + (" | 8K " + " ".join(f"{p:.1f}" for p, _ in r["book8k"]) if "book8k" in r else "")
        + (" | 32K " + " ".join(f"{p:.1f}" for p, _ in r["book32k"]) if "book32k" in r else "")
    )


for line in open(plan):
    line = line.strip()
    if not line or line.startswith("#"):
        continue
    if time.time() - start > budget:
        say("out of time before " + line)
        break
    cfg = json.loads(line)
    t0 = time.time()
    try:
        if cfg["name"] == "teacher":
            r = measure(teacher, cfg.get("extra", False))
            say(f"teacher {short(r)}")
            f.write(json.dumps({"cfg": cfg, "r": r}) + "\n")
            f.flush()
            continue
        torch.manual_seed(cfg.get("seed", 0))
        m = Model(copy.deepcopy(hf), cfg["v"])
        for mix, (mu, var) in zip(m.mixes, stats):
            mix.mu, mix.var = mu, var
        if cfg.get("tokens"):
            m.train()
            tune(m, teacher, pool(cfg["data"], cfg.get("seed", 0)), cfg, say)
        r = measure(m, cfg.get("extra", False))
        say(
            f"{cfg['name']}: {short(r)}  ({time.time() - t0:.0f} s, {torch.cuda.max_memory_allocated() / 2**30 if dev == 'cuda' else 0:.0f} GiB)"
        )
        rec = {"cfg": cfg, "r": r}
        if cfg["v"]["far"] != "none" and cfg.get("tokens"):
            m.v = dict(m.v, skip_far=True)
            b = by_position(m, teacher, books)
            rec["off"] = b
            say("   far off: " + " ".join(f"{p:.1f}/{k:.3f}" for p, k in b))
        if m.mixes and cfg.get("tokens"):
            for nme, p in m.mixes[15].named_parameters():
                say(f"   layer 15 {nme} {[round(x, 2) for x in p.flatten().tolist()[:9]]}")
        f.write(json.dumps(rec) + "\n")
        f.flush()
        del m, rec
    except Exception as e:
        say(f"{cfg['name']} FAILED {type(e).__name__} {str(e)[:300]}")
    if dev == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
