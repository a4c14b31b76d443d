"""Forms of attention to try before they get kernels: which one carries long context after little tuning?

A form is window softmax (with sinks, and with keys that were selected to stay) mixed with a linear memory of what has left
the window, in plain PyTorch and in chunks of C tokens. A form is a dict:

window, sinks      tokens
select, score      how many keys stay, and by what: lownorm, highnorm, mean (what the mean query likes: expected attention),
                   learned (the same with a learned direction; `soft` and `temperature` are its training form)
far                none, linear (decayed sums) or delta (gated delta rule)
feature, tau       softmax, two (of x and of -x), exp, unit
mix, b             of linear: add (its mean, times b), convex (by sigma(b)), lse (one more key, of logit b + log denominator)
gate               of delta: key, or a constant
life_from, life_to half-lives of the first and the last key/value head

Learned besides the weights: b and tau a head, half-life and write strength a key/value head."""

import math
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

dev = "cuda" if torch.cuda.is_available() else "cpu"
C = 64


def rope(x, cos, sin):  # [B, n, T, D]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class LoRA(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base, self.rank = base, rank
        o, i = base.weight.shape
        self.a = nn.Parameter(torch.randn(rank, i, device=base.weight.device) / math.sqrt(i))
        self.b = nn.Parameter(torch.zeros(o, rank, device=base.weight.device))

    def forward(self, x):
        return self.base(x) + (x @ self.a.to(x.dtype).t()) @ self.b.to(x.dtype).t() * 2.0


class Mix(nn.Module):
    """The variant's own scalars, of one layer."""

    def __init__(self, v, H, K, D):
        super().__init__()
        self.v = v
        p = lambda value, n=H: nn.Parameter(torch.full((n,), float(value), device=dev))
        if v["far"] != "none":
            self.tq, self.tk = p(v.get("tau", 1.0)), p(v.get("tau", 1.0), K)
            self.b = p(v.get("b", 0.0))
            lives = torch.logspace(
                math.log10(v.get("life_from", 256)), math.log10(v.get("life_to", 4096)), K, device=dev
            )
            self.decay = nn.Parameter(torch.log(math.log(2) / lives))  # log of -log gate
            self.beta = p(v.get("beta", 0.0), K)
            if v.get("gate") == "key":
                self.gk = p(1.0, K)
        if v.get("score") == "learned":
            self.w = nn.Parameter(torch.zeros(K, D, device=dev))


def chunks(x):  # [B, n, T, D] -> [B, n, T/C, C, D]
    return x.view(*x.shape[:2], -1, C, x.shape[-1])


def before(x, by):
    """The chunk `by` chunks earlier; zeros before the first."""
    by = min(by, x.shape[2])
    return torch.cat((torch.zeros_like(x[:, :, :by]), x[:, :, : x.shape[2] - by]), 2)


def feature(x, t, kind):  # [B, n, T, D], t [n]
    t = t[None, :, None, None].to(torch.float32)
    x = x.float() * t
    if kind == "softmax":
        return x.softmax(-1)
    if kind == "two":
        return torch.cat((x.softmax(-1), (-x).softmax(-1)), -1)
    if kind == "exp":
        return torch.cat((x.clamp(-12, 12).exp(), (-x).clamp(-12, 12).exp()), -1)
    if kind == "unit":
        return F.normalize(x, dim=-1)
    raise ValueError(kind)


def learned(mix, k, G, scale):
    """What the mean query likes, and a learned direction more: [B, K, T]."""
    K = k.shape[1]
    mu = mix.mu.view(K, G, -1).mean(1) * scale
    return torch.einsum("kd,bktd->bkt", (mu + mix.w).float(), k.float())


def soft_select(v, mix, q, k, qr, kr, val, temperature):
    """Training form of a learned selection: every far key is seen through sigma((score - threshold) / temperature), where
    the threshold is the score of the last one that would be kept."""
    B, H, T, D = q.shape
    K = k.shape[1]
    G, W, sinks, M = H // K, v["window"], v["sinks"], v["select"]
    t = torch.arange(T, device=q.device)
    with torch.autocast(dev, enabled=False):
        score = learned(mix, k, G, D**-0.5)
    n = T // C
    starts = torch.arange(n, device=q.device) * C - W
    visible = (t[None] < starts[:, None]) & (t[None] >= sinks)
    sc = score.detach()[:, :, None].masked_fill(~visible, float("-inf"))
    threshold = sc.topk(min(M + 1, T), -1)[0][..., -2:].mean(-1)  # [B, K, n]; -inf where all fit
    threshold = threshold.repeat_interleave(C, 2)[..., None].clamp(min=-1e4)
    bias = F.logsigmoid((score[:, :, None] - threshold) / temperature)  # [B, K, T, T]
    near = ((t[:, None] - t[None] < W) | (t[None] < sinks)) & (t[:, None] >= t[None])
    between = (
        (t[:, None] >= t[None]) & ~near & (t[None] >= (t[:, None] // C * C - W))
    )  # leaves the window in this chunk
    bias = bias.masked_fill(near, 0.0).masked_fill((t[:, None] < t[None]) | between, float("-inf"))
    return F.scaled_dot_product_attention(
        qr, kr, val, attn_mask=bias.to(q.dtype).repeat_interleave(G, 1), enable_gqa=True
    )


def attention(v, mix, q, k, qr, kr, val):
    if v.get("soft") and torch.is_grad_enabled():
        return soft_select(v, mix, q, k, qr, kr, val, v["temperature"])
    """q, qr [B, H, T, D]; k, kr, val [B, K, T, D] -> [B, H, T, D]."""
    B, H, T, D = q.shape
    K = k.shape[1]
    G = H // K
    w, sinks = v["window"] // C, v["sinks"]
    n = T // C
    scale = D**-0.5
    rep = lambda x: x.repeat_interleave(G, 1)
    qc, kc, vc = chunks(qr) * scale, rep(chunks(kr)), rep(chunks(val))  # [B, H, n, C, D]
    i = torch.arange(C, device=q.device)
    logits, values = [], []
    ninf = float("-inf")
    for back in range(w + 1):
        kb, vb = before(kc, back) if back else kc, before(vc, back) if back else vc
        s = (qc @ kb.transpose(-1, -2)).float()
        ok = torch.ones(C, C, dtype=torch.bool, device=q.device)
        if back == 0:
            ok = i[:, None] >= i[None]
        if back == w:
            ok = i[:, None] < i[None]
        exists = (torch.arange(n, device=q.device) >= back)[:, None, None]
        if back:  # sinks have their own place
            first = (torch.arange(n, device=q.device)[:, None] - back) * C + i[None] < sinks
            exists = exists & ~first[:, None, :]
        else:
            first = torch.arange(n, device=q.device)[:, None] * C + i[None] < sinks
            exists = exists & ~first[:, None, :]
        logits.append(s.masked_fill(~(ok & exists), ninf))
        values.append(vb)
    if sinks:
        ks, vs = rep(kr[:, :, :sinks]), rep(val[:, :, :sinks])
        s = (qc @ ks[:, :, None].transpose(-1, -2)).float()
        t = torch.arange(T, device=q.device).view(n, C, 1)
        logits.append(s.masked_fill(t < torch.arange(sinks, device=q.device), ninf))
        values.append(vs[:, :, None].expand(-1, -1, n, -1, -1))
    chosen = None
    if v.get("select"):
        M = v["select"]
        if v["score"] == "lownorm":
            score = -k.float().norm(dim=-1)
        elif v["score"] == "highnorm":
            score = k.float().norm(dim=-1)
        elif v["score"] == "mean":  # how well the mean query (and its spread) likes it: expected attention
            mu, var = mix.mu, mix.var  # [H, D]
            e = torch.einsum("hd,bhtd->bht", mu, rep(k).float()) * scale + 0.5 * scale**2 * torch.einsum(
                "hd,bhtd->bht", var, rep(k).float() ** 2
            )
            score = e.view(B, K, G, T).logsumexp(2)
            if v.get("vnorm"):
                score = score + (val.float().norm(dim=-1) + 1e-6).log()
        elif v["score"] == "learned":
            score = learned(mix, k, G, scale)
        # before chunk c: the best of the keys of chunks < c - w, sinks left out
        sc = score.detach().view(B, K, 1, T).expand(-1, -1, n, -1)
        pos = torch.arange(T, device=q.device)
        visible = (pos[None] < (torch.arange(n, device=q.device)[:, None] - w) * C) & (pos[None] >= sinks)
        sc = sc.masked_fill(~visible, ninf)
        top, at = sc.topk(min(M, T), -1)  # [B, K, n, M]
        gather = lambda x: x.unsqueeze(2).expand(-1, -1, n, -1, -1).gather(3, at[..., None].expand(-1, -1, -1, -1, D))
        ks, vs = rep(gather(kr)), rep(gather(val))
        s = (qc @ ks.transpose(-1, -2)).float()
        logits.append(s.masked_fill(rep(top == ninf)[:, :, :, None], ninf))
        values.append(vs)
        chosen = at
    m = torch.stack([l.amax(-1) for l in logits]).amax(0)[..., None]
    weights = [(l - m).exp() for l in logits]
    z = sum(p.sum(-1, keepdim=True) for p in weights)
    num = sum(p.to(val.dtype) @ x for p, x in zip(weights, values)).float()
    if v["far"] == "none":
        return (num / z).to(val.dtype).reshape(B, H, T, D)
    with torch.autocast(dev, enabled=False):
        return mixed(v, mix, q, k, val, num, z, m, w, n)


def mixed(v, mix, q, k, val, num, z, m, w, n):
    """The window's softmax and the memory of what left it, in float32."""
    B, H, T, D = q.shape
    K, sinks = k.shape[1], v["sinks"]
    G = H // K
    i = torch.arange(C, device=q.device)
    if v["far"] == "delta":
        far = delta(v, mix, q, k, val, w)
        if v.get("skip_far"):
            far = far * 0
        return (num / z + mix.b.view(1, H, 1, 1, 1) * chunks(far)).to(val.dtype).reshape(B, H, T, D)
    # linear memory of keys older than the window; sinks and what is padded weigh nothing
    fq, fk = feature(q, mix.tq, v["feature"]), feature(k, mix.tk, v["feature"])
    live = (torch.arange(T, device=q.device) >= sinks).float()[:, None]
    fk = fk * live
    fqc, fkc = chunks(fq), chunks(fk)
    ones = torch.cat((chunks(val.float()), torch.ones(B, K, n, C, 1, device=q.device)), -1)  # [B, K, n, C, D+1]
    g = mix.decay.exp()  # [K], -log gate a token
    if v.get("gate") == "none":
        g = g * 0
    left = (-g[:, None] * (C - 1 - i)).exp()  # [K, C] decay to the chunk's end
    S = (fkc * left.view(1, K, 1, C, 1)).transpose(-1, -2) @ ones
    # state after chunk c: sum over m <= c of decay^(C (c - m)) S_m
    cn = torch.arange(n, device=q.device)
    Dm = torch.where(
        cn[:, None] >= cn[None], (-g[:, None, None] * C * (cn[:, None] - cn[None])).exp(), torch.zeros(()).to(q.device)
    )
    P = (Dm[None] @ S.flatten(3)).view_as(S)
    P = before(P, w + 1)  # what chunk c reads: up to chunk c - w - 1
    fqg = fqc.view(B, K, G, n, C, -1)
    right = (-g[:, None] * (i + 1)).exp()
    # the query heads of a group stacked as rows
    stack = lambda x: x.transpose(2, 3).reshape(B, K, n, G * C, x.shape[-1])
    unstack = lambda x: x.view(B, K, n, G, C, x.shape[-1]).transpose(2, 3)
    inter = unstack(stack(fqg) @ P) * right.view(1, K, 1, 1, C, 1)
    kb, ob = before(fkc, w), before(ones, w)
    A = unstack(stack(fqg) @ kb.transpose(-1, -2))
    Dc = torch.where(
        i[:, None] >= i[None], (-g[:, None, None] * (i[:, None] - i[None])).exp(), torch.zeros(()).to(q.device)
    )
    intra = unstack(stack(A * Dc.view(1, K, 1, 1, C, C)) @ ob)
    far = (inter + intra).reshape(B, H, n, C, D + 1)
    fn, fz = far[..., :D], far[..., D:]
    b = mix.b.view(1, H, 1, 1, 1)
    if v["mix"] == "add":
        o = num / z + b * fn / (fz + 1e-6) if v.get("mean", True) else num / z + b * fn
    elif v["mix"] == "convex":
        has = (fz > 1e-6).float()
        gate = torch.sigmoid(b) * has
        o = (1 - gate) * num / z + gate * fn / (fz + 1e-6)
    elif v["mix"] == "lse":  # the memory is one more key, whose logit is b + log of its denominator
        lw = m + z.log()
        lf = b + (fz + 1e-9).log()
        gate = torch.sigmoid(lf - lw)
        o = (1 - gate) * num / z + gate * fn / (fz + 1e-9)
    if v.get("skip_far"):
        o = num / z
    return o.to(val.dtype).reshape(B, H, T, D)


def delta(v, mix, q, k, val, w):
    """Gated delta rule on keys that left the window: S_t = g S_{t-1} (I - b k k^T) + b k v^T; o = S q. [B,H,T,D]"""
    B, H, T, D = q.shape
    K, n = k.shape[1], T // C
    G = H // K
    kind = v["feature"]
    fq, fk = feature(q, mix.tq, kind), feature(k, mix.tk, kind)
    if kind != "unit":
        fq, fk = F.normalize(fq, dim=-1), F.normalize(fk, dim=-1)
    E = fk.shape[-1]
    i = torch.arange(C, device=q.device)
    bt = torch.sigmoid(mix.beta)[None, :, None, None].expand(B, K, T, 1)
    if v.get("gate") == "key":
        bt = torch.sigmoid(
            mix.beta[None, :, None, None] + mix.gk[None, :, None, None] * k.float().mean(-1, keepdim=True)
        )
    live = (torch.arange(T, device=q.device) >= v["sinks"]).float()[:, None]
    bt = bt * live
    kc, vc, bc = chunks(fk), chunks(val.float()), chunks(bt)
    g = mix.decay.exp()
    dec = lambda x: -g.view(1, K, 1, 1, 1) * x
    Dl = torch.where(
        i[:, None] > i[None], (-g[:, None, None] * (i[:, None] - i[None])).exp(), torch.zeros(()).to(q.device)
    )[None, :, None]
    Ll = (bc * kc) @ kc.transpose(-1, -2) * Dl  # strictly lower
    eye = torch.eye(C, device=q.device)
    inv = torch.linalg.solve_triangular(eye + Ll, eye.expand_as(Ll), upper=False, unitriangular=True)
    U = inv @ (bc * vc)  # [B,K,n,C,D]
    into = dec((i + 1).view(1, 1, 1, C, 1).float()).exp()
    W = inv @ (bc * kc * into)
    out_ = dec((C - 1 - i).view(1, 1, 1, C, 1).float()).exp()
    kd = kc * out_
    # S' = gC S + kd^T (U - W S)
    gC = dec(torch.tensor(float(C), device=q.device)).exp()[:, :, 0]
    S = torch.zeros(B, K, E, D, device=q.device)
    states, us = [], []
    for c in range(n):
        states.append(S)
        u = U[:, :, c] - W[:, :, c] @ S
        us.append(u)
        S = gC * S + kd[:, :, c].transpose(-1, -2) @ u
    Sn, u = torch.stack(states, 2), torch.stack(us, 2)
    # queries read the memory as it was one window ago
    Sr, ur, kr_ = before(Sn, w), before(u, w), before(kc, w)
    fqg = chunks(fq).view(B, K, G, n, C, E)
    Dc = torch.where(
        i[:, None] >= i[None], (-g[:, None, None] * (i[:, None] - i[None])).exp(), torch.zeros(()).to(q.device)
    )
    inter = torch.einsum("bkgnci,bknij,kc->bkgncj", fqg, Sr, into.view(K, C))
    A = torch.einsum("bkgnci,bknsi->bkgncs", fqg, kr_)
    intra = torch.einsum("bkgncs,kcs,bknsj->bkgncj", A, Dc, ur)
    return (inter + intra).reshape(B, H, T, D)


class Model(nn.Module):
    def __init__(self, hf, variant=None):
        super().__init__()
        self.c = hf.config
        self.inner = hf
        self.v = variant
        c = self.c
        self.H, self.K, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.mixes = (
            nn.ModuleList(Mix(variant, self.H, self.K, self.D) for _ in range(c.num_hidden_layers)) if variant else None
        )
        inv = 1.0 / (100000.0 ** (torch.arange(0, self.D, 2, device=dev).float() / self.D))
        self.inv = inv
        self.stats = None

    def hidden(self, ids, offset=0):
        m = self.inner.model
        x = m.embed_tokens(ids)
        B, T = ids.shape
        f = torch.arange(T, device=ids.device).float()[:, None] * self.inv[None]
        cos, sin = f.cos().to(x.dtype), f.sin().to(x.dtype)
        for l, layer in enumerate(m.layers):
            a = layer.self_attn
            h = layer.input_layernorm(x)
            q = a.q_proj(h).view(B, T, self.H, self.D).transpose(1, 2)
            k = a.k_proj(h).view(B, T, self.K, self.D).transpose(1, 2)
            val = a.v_proj(h).view(B, T, self.K, self.D).transpose(1, 2)
            qr, kr = rope(q, cos, sin), rope(k, cos, sin)
            if self.stats is not None:
                self.stats[l][0] += qr.float().mean((0, 2))
                self.stats[l][1] += qr.float().pow(2).mean((0, 2))
                self.stats[l][2] += 1
            if self.v is None:
                o = F.scaled_dot_product_attention(qr, kr, val, is_causal=True, enable_gqa=True)
            else:
                fn = lambda *t: attention(self.v, self.mixes[l], *t)
                if torch.is_grad_enabled() and self.v.get("recompute", True):
                    o = torch.utils.checkpoint.checkpoint(fn, q, k, qr, kr, val, use_reentrant=False)
                else:
                    o = fn(q, k, qr, kr, val)
            x = x + a.o_proj(o.transpose(1, 2).reshape(B, T, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return m.norm(x)

    def logits(self, h):
        return h @ self.inner.model.embed_tokens.weight.t().to(h.dtype)


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(dev)


@torch.no_grad()
def by_position(model, teacher, pieces, edges=(0, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768), batch=4):
    """ppl and KL by position; pieces [N, T]."""
    T = pieces.shape[1]
    nll, kl = torch.zeros(T, dtype=torch.float64), torch.zeros(T, dtype=torch.float64)
    for at in range(0, len(pieces), batch):
        ids = torch.tensor(pieces[at : at + batch].astype("int64"), device=dev)
        with torch.autocast(dev, torch.bfloat16):
            h = model.hidden(ids)
            ht = teacher.hidden(ids) if teacher is not model else h
            for first in range(0, T - 1, 512):
                last = min(T - 1, first + 512)
                lp = model.logits(h[:, first:last]).float().log_softmax(-1)
                y = ids[:, first + 1 : last + 1]
                nll[first + 1 : last + 1] += -lp.gather(-1, y[..., None])[..., 0].sum(0).double().cpu()
                if teacher is not model:
                    lt = teacher.logits(ht[:, first:last]).float().log_softmax(-1)
                    kl[first + 1 : last + 1] += (lt.exp() * (lt - lp)).sum(-1).sum(0).double().cpu()
    out = []
    for a, b in zip(edges, edges[1:]):
        if a < T:
            lo, hi = max(a, 1), min(b, T)
            cnt = (hi - lo) * len(pieces)
            out.append((math.exp(nll[lo:hi].sum() / cnt), (kl[lo:hi].sum() / cnt).item()))
    return out


@torch.no_grad()
def recall(model, texts, batch=10):
    """texts: list of (ids, answer length); share of greedy-right answers, and the mean answer's log-likelihood."""
    right, ll = 0, 0.0
    for at in range(0, len(texts), batch):
        part = texts[at : at + batch]
        T = -(-max(len(t) for t, _ in part) // C) * C
        ids = torch.zeros(len(part), T, dtype=torch.long, device=dev)
        for r, (t, _) in enumerate(part):
            ids[r, : len(t)] = torch.tensor(t, device=dev)
        with torch.autocast(dev, torch.bfloat16):
            h = model.hidden(ids)
        for r, (t, n) in enumerate(part):
            lg = model.logits(h[r, len(t) - 1 - n : len(t) - 1].to(torch.bfloat16)).float().log_softmax(-1)
            y = ids[r, len(t) - n : len(t)]
            right += bool((lg.argmax(-1) == y).all())
            ll += lg.gather(-1, y[:, None]).sum().item()
    return right / len(texts), ll / len(texts)


def trainable(model, what, rank):
    for p in model.inner.parameters():
        p.requires_grad_(False)
    groups = [{"params": list(model.mixes.parameters()), "kind": "mix"}]
    ws = []
    for layer in model.inner.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            lin = getattr(layer.self_attn, name)
            if what == "lora":
                l = LoRA(lin, rank)
                setattr(layer.self_attn, name, l)
                ws += [l.a, l.b]
            elif what in ("mixer", "all"):
                lin.weight.requires_grad_(True)
                ws.append(lin.weight)
        if what == "loraall":
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                l = LoRA(getattr(layer.self_attn, name), rank)
                setattr(layer.self_attn, name, l)
                ws += [l.a, l.b]
            for name in ("gate_proj", "up_proj", "down_proj"):
                l = LoRA(getattr(layer.mlp, name), rank)
                setattr(layer.mlp, name, l)
                ws += [l.a, l.b]
        if what == "all":
            for p in list(layer.mlp.parameters()):
                p.requires_grad_(True)
                ws.append(p)
    groups.append({"params": ws, "kind": "w"})
    return groups


def tune(model, teacher, stream, cfg, log):
    groups = trainable(model, cfg["what"], cfg.get("rank", 8))
    lrs = {"mix": cfg.get("mix_lr", 1e-2), "w": cfg["lr"]}
    opt = torch.optim.AdamW(
        [{"params": g["params"], "lr": lrs[g["kind"]]} for g in groups if g["params"]],
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=dev == "cuda",
    )
    base = [g["lr"] for g in opt.param_groups]
    B, T = cfg["batch"], cfg["length"]
    steps = cfg["tokens"] // (B * T)
    gen = torch.Generator().manual_seed(cfg.get("seed", 0))
    order = torch.randperm(len(stream), generator=gen)
    t0 = time.time()
    every = max(1, steps // 8)
    acc = 0.0
    for step in range(steps):
        f = min(1, (step + 1) / max(1, steps * 0.03)) * (0.5 * (1 + math.cos(math.pi * step / steps)) * 0.95 + 0.05)
        for g, b in zip(opt.param_groups, base):
            g["lr"] = b * f
        rows = [stream[order[(step * B + r) % len(stream)].item()] for r in range(B)]
        ids = torch.tensor(np.stack(rows).astype("int64"), device=dev)[:, :T]
        with torch.autocast(dev, torch.bfloat16):
            with torch.no_grad():
                ht = teacher.hidden(ids)
            h = model.hidden(ids)
            # the head a piece at a time: its logits would be all of the memory
            hd = h.detach().requires_grad_(True)
            total = 0.0
            for at in range(0, T, 1024):
                with torch.no_grad():
                    lt = teacher.logits(ht[:, at : at + 1024]).float().log_softmax(-1)
                lp = model.logits(hd[:, at : at + 1024]).float().log_softmax(-1)
                loss = F.kl_div(lp, lt, log_target=True, reduction="sum") / (B * T)
                loss.backward()
                total += loss.detach()
        h.backward(hd.grad.to(h.dtype))
        torch.nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        acc += total
        if (step + 1) % every == 0:
            log(
                f"  step {step + 1}/{steps} KL {float(acc) / every:.4f} {B * T * (step + 1) / (time.time() - t0):.0f} tok/s"
            )
            acc = 0.0
