"""Texts for run.py: pieces of 2,048 tokens, and questions.

    python data.py MODEL RECORDS OUT

RECORDS holds instruct/ (Dolly, Alpaca), lm/ (books, C4) and benchmarks/ (LAMBADA) as .jsonl.zst."""

import json
import os
import random
import subprocess
import sys

import numpy as np
from tokenizers import Tokenizer

MODEL, D, OUT = sys.argv[1:4]
D += "/"
tok = Tokenizer.from_file(f"{MODEL}/tokenizer.json")
os.makedirs(OUT, exist_ok=True)
os.chdir(OUT)
enc = lambda s: tok.encode(s, add_special_tokens=False).ids


def rd(p):
    return [
        json.loads(l)
        for l in subprocess.run(["zstd", "-dc", D + p], capture_output=True).stdout.decode().split("\n")
        if l
    ]


books = rd("lm/books-longdoc.jsonl.zst")
ids = enc("\n\n".join(b["text"][20000:260000] for b in books))
print("book tokens", len(ids))
np.save("books.npy", np.array(ids[: 40 * 2048], dtype=np.uint16))
np.save("books_long.npy", np.array(ids[: 8 * 32768], dtype=np.uint16))
lam = rd("benchmarks/lambada_openai.jsonl.zst")
L = []
for r in lam:
    c, _, w = r["text"].rpartition(" ")
    a = enc(c)
    b = enc(c + " " + w)
    L.append((b, len(b) - len(a)))
json.dump(L, open("lambada.json", "w"))
IM = lambda r, t: f"<|im_start|>{r}\n{t}<|im_end|>\n"
SYS = IM("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
rng = random.Random(0)
dolly = rd("instruct/dolly-15k.jsonl.zst")
alp = rd("instruct/alpaca-original-subset.jsonl.zst") + rd("instruct/alpaca-en-demo-999.jsonl.zst")
c4 = rd("lm/c4-demo.jsonl.zst")
chats = []
for r in dolly + alp:
    c = r.get("context", r.get("input", ""))
    u = r["instruction"] + ("\n\n" + c if c else "")
    chats.append(enc(SYS + IM("user", u) + IM("assistant", r.get("response", r.get("output", "")))))
rng.shuffle(chats)
flat = [i for c in chats for i in c]
n = len(flat) // 2048
np.save("chat.npy", np.array(flat[: n * 2048], dtype=np.uint16).reshape(n, 2048))
print("chat", n)
flat = [i for r in c4 for i in enc(r["text"]) + [0]]
n = len(flat) // 2048
np.save("c4.npy", np.array(flat[: n * 2048], dtype=np.uint16).reshape(n, 2048))
print("c4", n)
# passages first, questions about them long after
ctx = [r for r in dolly if len(r["context"]) > 200]
print("contexts", len(ctx))
out = []
for epoch in range(2):
    rng.shuffle(ctx)
    at = 0
    while at < len(ctx):
        ids = []
        group = []
        while at < len(ctx) and len(ids) < 1400:
            r = ctx[at]
            at += 1
            t = enc(f"Text {len(group) + 1}: {r['context']}\n\n")
            if len(t) > 900:
                continue
            ids += t
            group.append(r)
        order = list(enumerate(group))
        rng.shuffle(order)
        k = 0
        while len(ids) < 2048 and order:
            j, r = order[k % len(order)]
            if k >= len(order):
                break
            ids += enc(f"Question about text {j + 1}: {r['instruction']}\nAnswer: {r['response']}\n\n")
            k += 1
        k = 0
        while len(ids) < 2048 and group:
            ids += enc(group[k % len(group)]["context"] + "\n\n")
            k += 1
        out.append(ids[:2048])
out = [o for o in out if len(o) == 2048]
np.save("ctx.npy", np.array(out, dtype=np.uint16))
print("ctx", len(out))
# recall-rich synthetic: lists, tables of words and numbers, asked for later in another order
words = sorted({w.strip('.,;:!?"()').lower() for r in dolly[:4000] for w in r["response"].split()})
words = [w for w in words if w.isalpha() and 3 < w.__len__() < 10]
print("words", len(words))
filler = [r["text"] for r in c4]
out = []
sents = [s.strip() for r in dolly for s in r["context"].replace("\n", " ").split(". ") if 30 < len(s) < 200]
forms = [
    ("The code for {a} is {b}.", "What is the code for {a}? The code for {a} is {b}."),
    ("{a}: {b}", "{a}: {b}"),
    ("{A} lives in house {b}.", "{A} lives in house {b}."),
    ("Note that the {a} costs {b} coins.", "How much does the {a} cost? The {a} costs {b} coins."),
    ("secret[{a}] = {b}", "print(secret[{a}])  # {b}"),
]
for _ in range(600):
    f = rng.choice(forms)
    n = rng.choice([1, 2, 4, 8, 16, 24])
    keys = rng.sample(words, n)
    vals = [
        str(rng.randrange(10 ** rng.choice([2, 3, 4, 5]))) if rng.random() < 0.6 else rng.choice(words) for _ in keys
    ]
    say = [f[0].format(a=a, A=a.capitalize(), b=b) for a, b in zip(keys, vals)]
    ids = []
    pend = list(zip(keys, vals))
    lines = []
    gap = rng.choice([0, 2, 6, 12])
    for s in say:
        lines.append(s)
        lines += rng.sample(sents, rng.randrange(gap + 1)) if gap else []
    while True:
        rng.shuffle(pend)
        for a, b in pend[:8]:
            lines.append(f[1].format(a=a, A=a.capitalize(), b=b))
            lines += rng.sample(sents, rng.randrange(4))
        t = enc("\n".join(lines))
        if len(t) >= 2048:
            break
    out.append(t[:2048])
np.save("synth.npy", np.array(out, dtype=np.uint16))
print("synth", len(out))


# passkey of the tool's own form
def passkey(length, depth, seed):
    r = random.Random(seed * 1000 + length + int(depth * 100))
    num = r.randrange(10000, 100000)

    def mk(n):
        l = ["The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."] * n
        l.insert(round(depth * n), f"The pass key is {num}. Remember it. {num} is the pass key.")
        c = (
            "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. I will ask you about it.\n"
            + "\n".join(l)
            + "\nWhat is the pass key? The pass key is"
        )
        a = enc(c)
        b = enc(c + f" {num}")
        return b, len(b) - len(a)

    n = 1
    while len(mk(n + 1)[0]) <= length:
        n += 1
    return mk(n)


json.dump(
    {str(L): [passkey(L, d, s) for s in range(6) for d in (0.1, 0.3, 0.5, 0.7, 0.9)] for L in (512, 2048)},
    open("passkey.json", "w"),
)
