"""Clients that stream greedily from a running server for some minutes: `python load.py --clients 64 --seconds 300 [--pid PID]`.

Every text is compared with the same text asked for alone; prints times to the first token and between tokens, tokens a second, and the
resident memory of the server's process. `--repeat N` puts N copies of a sentence before the prompts. Only the standard library.
"""

import argparse
import http.client
import json
import random
import threading
import time
import urllib.parse

options = argparse.ArgumentParser()
options.add_argument("--url", default="http://127.0.0.1:8080")
options.add_argument("--clients", type=int, default=64)
options.add_argument("--seconds", type=float, default=300)
options.add_argument("--tokens", type=int, default=48)
options.add_argument("--repeat", type=int, default=0)
options.add_argument("--prompts", type=int, default=24)
options.add_argument("--pid", type=int, help="process whose memory is read")
options.add_argument("--whole", action="store_true", help="answers in one piece: this program is slower than a GPU's streams")
options.add_argument("--no-compare", action="store_true", help="do not ask for the texts alone first")
options = options.parse_args()
address = urllib.parse.urlparse(options.url).netloc
long = "The old house by the river was quiet that morning. "
prompts = [f"Story {i}: " + long * (options.repeat + (30 if i % 4 == 0 else 0)) + "once there was" for i in range(options.prompts)]


def ask(prompt, first, between):
    """The text of a stream, or a status that is none."""
    connection, start, last = http.client.HTTPConnection(address), time.time(), None
    body = {"prompt": prompt, "max_tokens": options.tokens, "temperature": 0, "stream": not options.whole}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        answer.read()
        return answer.status, 0
    if options.whole:
        part = json.loads(answer.read())
        first.append(time.time() - start)
        return part["choices"][0]["text"], part["usage"]["completion_tokens"]
    text, tokens = "", 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        part = json.loads(line[6:])
        if "error" in part:
            return part["error"]["message"], 0
        if piece := part["choices"][0]["text"]:
            now = time.time()
            (first if last is None else between).append(now - (start if last is None else last))
            last, text = now, text + piece
        if part["usage"]:
            tokens = part["usage"]["completion_tokens"]
    connection.close()
    return text, tokens


def resident():
    with open(f"/proc/{options.pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


alone = {} if options.no_compare else {prompt: ask(prompt, [], [])[0] for prompt in prompts}
first, between, wrong, refused, written, texts = [], [], [], [0], [0], [0]
start = time.time()
end, lock = start + options.seconds, threading.Lock()


def client(number):
    draw = random.Random(number)
    while time.time() < end:
        prompt = draw.choice(prompts)
        text, tokens = ask(prompt, first, between)
        with lock:
            if text in (429, 503):
                refused[0] += 1
            else:
                texts[0], written[0] = texts[0] + 1, written[0] + tokens
                if alone and text != alone[prompt]:
                    wrong.append((prompt[-40:], alone[prompt], text))
        if text in (429, 503):
            time.sleep(1)


threads = [threading.Thread(target=client, args=(i,)) for i in range(options.clients)]
for thread in threads:
    thread.start()
memory = []
while time.time() < end:
    time.sleep(min(5, options.seconds / 10))
    if options.pid:
        memory.append(resident())
for thread in threads:
    thread.join()
seconds = time.time() - start
at = lambda values, share: sorted(values)[int(share * (len(values) - 1))]
print(f"{texts[0]} texts, {refused[0]} told to come again, {len(wrong)} differ from those written alone" + " (not compared)" * (not alone))
print(f"{'answer' if options.whole else 'first token'} p50 {at(first, 0.5):.3f} s, p99 {at(first, 0.99):.3f} s")
if between:
    print(f"between tokens p50 {1000 * at(between, 0.5):.1f} ms, p99 {1000 * at(between, 0.99):.1f} ms")
print(f"{written[0] / seconds:.0f} tokens/s written by {options.clients} clients in {seconds:.0f} s")
if memory:
    settled = memory[len(memory) // 5 :]
    print(f"resident MiB after a fifth of the time: {min(settled) / 1024:.1f} to {max(settled) / 1024:.1f}")
for case in wrong[:3]:
    print(*map(repr, case), sep="\n  ")
