"""The chunked forms against their definitions: prints the largest differences."""

import math

import torch
import torch.nn.functional as F

from variants import Mix, attention, feature, rope

torch.manual_seed(0)
B, H, K, T, D = 2, 6, 2, 256, 16
q, k, v_ = torch.randn(B, H, T, D), torch.randn(B, K, T, D), torch.randn(B, K, T, D)
inv = 1 / (1e5 ** (torch.arange(0, D, 2).float() / D))
f = torch.arange(T).float()[:, None] * inv
qr, kr = rope(q, f.cos(), f.sin()), rope(k, f.cos(), f.sin())
G = H // K
rep = lambda x: x.repeat_interleave(G, 1)
t = torch.arange(T)
for W in (64, 128):
    for sinks in (0, 4):
        win = ((t[:, None] - t[None] < W) | (t[None] < sinks)) & (t[:, None] >= t[None])
        s = (qr @ rep(kr).transpose(-1, -2)) * D**-0.5
        s = s.masked_fill(~win, -math.inf)
        ref = s.softmax(-1) @ rep(v_)
        v = dict(window=W, sinks=sinks, far="none")
        o = attention(v, None, q, k, qr, kr, v_)
        print("win", W, sinks, (o - ref).abs().max().item())
        for mixk in ("add", "convex", "lse"):
            v = dict(window=W, sinks=sinks, far="linear", feature="two", mix=mixk, b=0.3, life_from=30, life_to=100)
            mix = Mix(v, H, K, D)
            o = attention(v, mix, q, k, qr, kr, v_)
            fq, fk = feature(q, mix.tq, "two"), feature(k, mix.tk, "two")
            g = mix.decay.exp().repeat_interleave(G)
            far = (t[:, None] - t[None] >= W) & (t[None] >= sinks)
            dist = (t[:, None] - t[None] - W + 1).clamp(min=0)
            a = (fq @ rep(fk).transpose(-1, -2)) * (-g[:, None, None] * dist).exp() * far
            fn, fz = a @ rep(v_), a.sum(-1, keepdim=True)
            if mixk == "add":
                r = ref + 0.3 * fn / (fz + 1e-6)
            elif mixk == "convex":
                gg = torch.sigmoid(torch.tensor(0.3)) * (fz > 1e-6)
                r = (1 - gg) * ref + gg * fn / (fz + 1e-6)
            else:
                lw = s.logsumexp(-1, keepdim=True)
                gg = torch.sigmoid(0.3 + (fz + 1e-9).log() - lw)
                r = (1 - gg) * ref + gg * fn / (fz + 1e-9)
            print(mixk, W, sinks, (o - r).abs().max().item())
        for feat in ("unit", "two"):
            v = dict(
                window=W, sinks=sinks, far="delta", feature=feat, b=0.5, beta=0.3, gate="key", life_from=30, life_to=100
            )
            mix = Mix(v, H, K, D)
            o = attention(v, mix, q, k, qr, kr, v_)
            fq, fk = F.normalize(feature(q, mix.tq, feat), dim=-1), F.normalize(feature(k, mix.tk, feat), dim=-1)
            E = fk.shape[-1]
            S = torch.zeros(B, K, E, D)
            out = torch.zeros(B, H, T, D)
            ga = (-mix.decay.exp()).exp().view(1, K, 1, 1)
            bt = torch.sigmoid(mix.beta[None, :, None] + mix.gk[None, :, None] * k.mean(-1))
            for p in range(T):
                j = p - W
                if j >= 0:
                    S = S * ga
                    if j >= sinks:
                        kk, vv, b = fk[:, :, j], v_[:, :, j], bt[:, :, j, None]
                        S = S + (b * kk)[..., None] * (vv - (S * kk[..., None]).sum(-2))[..., None, :]
                out[:, :, p] = torch.einsum("bhe,bhed->bhd", fq[:, :, p], rep(S))
            r = ref + 0.5 * out
            print("delta", feat, W, sinks, (o - r).abs().max().item(), out.abs().max().item())
        v = dict(window=W, sinks=sinks, far="none", select=32, score="lownorm")
        mix = Mix(v, H, K, D)
        o = attention(v, mix, q, k, qr, kr, v_)
        print("sel", (o - ref).abs().max().item())
        v = dict(window=W, sinks=sinks, far="none", select=10000, score="lownorm")
        o = attention(v, mix, q, k, qr, kr, v_)
        full = ((qr @ rep(kr).transpose(-1, -2)) * D**-0.5).masked_fill(t[:, None] < t[None], -math.inf).softmax(
            -1
        ) @ rep(v_)
        # with every key selectable only the block still leaving the window is missing
        tt = torch.arange(0, T, 64)
        print("selall at chunk starts", (o - full)[:, :, tt].abs().max().item())
v = dict(window=64, sinks=4, far="none", select=32, score="learned", soft=True, temperature=1e-4)
mix = Mix(v, H, K, D)
mix.mu = torch.randn(H, D)
with torch.no_grad():
    hard = attention(v, mix, q, k, qr, kr, v_)
soft = attention(v, mix, q, k, qr, kr, v_)
print("soft at low temperature vs hard", (hard - soft).abs().max().item())
soft.sum().backward()
print("grad", mix.w.grad.abs().max().item())
d = (hard - soft).abs().amax(-1)
print("share above 1e-3:", (d > 1e-3).float().mean().item())
