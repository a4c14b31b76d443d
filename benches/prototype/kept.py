"""Which keys should stay when they leave the window? Rules for `kept`, before one of them got kernels.

    python kept.py MODEL TEXTS < plan      (TEXTS: data.py's folder; a plan has a line `name dict(...)` a form)

Nothing is tuned. A query sees its own stretch of `page` tokens, the one before, four sinks, and M keys that were kept of all
earlier stretches; the rule is asked once a stretch. A form is a dict:

page, M      tokens of a stretch, keys that stay
rule         expected (what the mean query of three texts of C4 likes), run (of all queries so far), h2o (most attention so far;
             `keep`: what is left of it a stretch), key (least like the mean key so far), key-now (the same, of the mean of now)
rot, own     of key: after RoPE; with the mean of the whole stretch that the key is in
decay, vnorm added to the score: a number a token of its position, or times the log of the value's norm
quota        so many stay by the rule; the others by `second`: decay (the rule's score plus `qdecay` a token) or recent (what
             the mean of the last `w` queries likes), each (what each of them likes)
"""

import itertools
import json
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

torch.set_grad_enabled(False)
MODEL, TEXTS = sys.argv[1:3]
SINKS, NEVER = 4, float("-inf")
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
c = model.config
H, K, D, layers = (
    c.num_attention_heads,
    c.num_key_value_heads,
    c.head_dim,
    c.num_hidden_layers,
)
G, scale = H // K, c.head_dim**-0.5
theta = (
    c.rope_parameters["rope_theta"] if hasattr(c, "rope_parameters") else c.rope_theta
)
inverse = 1.0 / theta ** (torch.arange(0, D, 2).float() / D)
per_head = lambda x: x.repeat_interleave(G, 0)
unit = lambda x: x / x.norm(dim=-1, keepdim=True)


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def liked(mean, keys, variance=None):
    """log sum over a group's heads of exp(mean query . key); mean [H, D], keys [K, T, D] -> [K, T]"""
    e = torch.einsum("hd,htd->ht", mean, per_head(keys)) * scale
    if variance is not None:
        e = e + 0.5 * scale**2 * torch.einsum(
            "hd,htd->ht", variance, per_head(keys) ** 2
        )
    return e.view(K, G, -1).logsumexp(1)


def fixed_scores(v, layer, k, kr, val):
    """Of rules whose score does not change: [K, T]."""
    T = k.shape[1]
    if v["rule"] == "expected":
        score = liked(stats[layer][0], k, stats[layer][1])
    elif v["rule"] == "key":
        x = unit(kr if v.get("rot") else k)
        total = x.cumsum(1)
        if v.get("own"):
            total = total[:, v["page"] - 1 :: v["page"]].repeat_interleave(v["page"], 1)
        score = -(x * unit(total)).sum(-1)
    else:
        return None
    return (
        score
        + v.get("decay", 0) * torch.arange(T)
        + v.get("vnorm", 0) * val.norm(dim=-1).log()
    )


def kept(v, layer, q, k, qr, kr, val):
    """Positions kept for every stretch, [K, up to M] each."""
    T, P, M = q.shape[1], v["page"], v["M"]
    fixed = fixed_scores(v, layer, k, kr, val)
    stays, attention, lists = torch.zeros(K, 0, dtype=torch.long), torch.zeros(K, T), []
    for p in range(T // P):
        here, gone = (
            p * P,
            (p - 1) * P,
        )  # the stretch's first token, and the first that the window still has
        if gone > SINKS:
            left = torch.cat(
                (stays, torch.arange(max(gone - P, SINKS), gone).expand(K, -1)), 1
            )
            if left.shape[1] <= M:
                stays = left
            else:
                if v["rule"] == "h2o":
                    score = attention
                elif v["rule"] == "run":
                    mean = qr[:, :here].mean(1)
                    variance = (
                        (qr[:, :here] ** 2).mean(1) - mean**2
                        if v.get("variance")
                        else None
                    )
                    score = liked(mean, k, variance)
                elif v["rule"] == "key-now":
                    x = unit(kr if v.get("rot") else k)
                    score = -(x * unit(x[:, :gone].mean(1, keepdim=True))).sum(-1)
                else:
                    score = fixed
                best = score.gather(1, left).topk(v.get("quota", M), 1)[1]
                if "quota" in v:
                    last = qr[:, max(here - v.get("w", P), 0) : here]
                    if v["second"] == "recent":
                        other = liked(last.mean(1), kr)
                    elif v["second"] == "each":
                        other = (
                            (last * scale @ per_head(kr).transpose(1, 2))
                            .logsumexp(1)
                            .view(K, G, T)
                            .logsumexp(1)
                        )
                    else:
                        other = score + v["qdecay"] * torch.arange(T)
                    other = other.gather(1, left).scatter(1, best, NEVER)
                    best = torch.cat((best, other.topk(M - v["quota"], 1)[1]), 1)
                stays = left.gather(1, best)
        lists.append(stays)
        if v["rule"] == "h2o":
            seen = torch.zeros(K, T, dtype=torch.bool)
            seen[:, :SINKS] = seen[:, max(gone, 0) : here + P] = True
            seen.scatter_(1, stays, True)
            rows = torch.arange(here, here + P)
            seen = seen[:, None] & (torch.arange(T)[None] <= rows[:, None])
            weights = (qr[:, rows] * scale @ per_head(kr).transpose(1, 2)).masked_fill(
                ~per_head(seen), NEVER
            )
            attention = attention * v.get("keep", 1.0) + weights.softmax(-1).view(
                K, G, P, T
            ).sum((1, 2))
    return lists


def attend(v, layer, q, k, qr, kr, val):
    if v is None:
        return F.scaled_dot_product_attention(
            qr[None], kr[None], val[None], is_causal=True, enable_gqa=True
        )[0]
    T, P = q.shape[1], v["page"]
    t = torch.arange(T)
    near = ((t[None] >= (t[:, None] // P - 1) * P) | (t[None] < SINKS)) & (
        t[None] <= t[:, None]
    )
    seen = near.expand(K, T, T).clone()
    for p, stays in enumerate(kept(v, layer, q, k, qr, kr, val)):
        for h in range(K):
            seen[h, p * P : (p + 1) * P][:, stays[h]] = True
    return F.scaled_dot_product_attention(
        qr[None],
        per_head(kr)[None],
        per_head(val)[None],
        attn_mask=per_head(seen)[None],
    )[0]


def hidden(ids, v, collect=None):
    inner, T = model.model, len(ids)
    x = inner.embed_tokens(ids)
    angles = torch.arange(T).float()[:, None] * inverse[None]
    cos, sin = angles.cos(), angles.sin()
    for l, layer in enumerate(inner.layers):
        a, h = layer.self_attn, layer.input_layernorm(x)
        q, k, val = (
            f(h).view(T, -1, D).transpose(0, 1) for f in (a.q_proj, a.k_proj, a.v_proj)
        )
        qr, kr = rope(q, cos, sin), rope(k, cos, sin)
        if collect is not None:
            collect[l][0] += qr.mean(1) / 3
            collect[l][1] += qr.pow(2).mean(1) / 3
        x = x + a.o_proj(attend(v, l, q, k, qr, kr, val).transpose(0, 1).reshape(T, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return inner.norm(x)


stats = [[torch.zeros(H, D), torch.zeros(H, D)] for _ in range(layers)]
for ids in np.load(f"{TEXTS}/c4.npy")[:3]:
    hidden(torch.tensor(ids.astype("int64")), None, stats)
stats = [(mean, (square - mean**2).clamp(min=0)) for mean, square in stats]
books = torch.tensor(
    np.load(f"{TEXTS}/books.npy").astype("int64").reshape(-1, 2048)[::13][:3]
)
with open(f"{TEXTS}/passkey.json") as file:
    passkeys = json.load(file)["2048"][:4]
output = model.get_output_embeddings().weight.t()
teacher = [hidden(ids, None) for ids in books]


def measure(name, v):
    start, kl, loss = time.time(), torch.zeros(2047), torch.zeros(2047)
    for ids, of_teacher in zip(books, teacher):
        h = hidden(ids, v) if v else of_teacher
        for a in range(0, 2047, 512):
            b = min(a + 512, 2047)
            t, s = ((x[a:b] @ output).log_softmax(-1) for x in (of_teacher, h))
            kl[a:b] += (t.exp() * (t - s)).sum(-1) / len(books)
            loss[a:b] -= s.gather(1, ids[a + 1 : b + 1, None])[:, 0] / len(books)
    edges = [1, 64, 256, 1024, 2048]
    stretches = [slice(a - 1, b - 1) for a, b in itertools.pairwise(edges)]
    found = " ".join(
        f"{math.exp(loss[s].mean()):.1f}/{kl[s].mean():.3f}" for s in stretches
    )
    right, likely = 0, 0.0
    for text, n in passkeys:
        ids = torch.tensor(text + [0] * (-len(text) % (v or {}).get("page", 64)))
        logits = (
            hidden(ids, v)[len(text) - 1 - n : len(text) - 1] @ output
        ).log_softmax(-1)
        answer = torch.tensor(text[-n:])
        right += bool((logits.argmax(-1) == answer).all())
        likely += logits.gather(1, answer[:, None]).sum().item() / len(passkeys)
    print(
        f"{name}: {found} passkeys {right}/{len(passkeys)} {likely:.1f} ({time.time() - start:.0f} s)",
        flush=True,
    )


for line in sys.stdin:
    name, _, form = line.strip().partition(" ")
    if name:
        measure(name, eval(form) if form else None)
