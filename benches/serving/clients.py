"""What OpenAI's own Python client sees of a running server: `python clients.py [--url http://127.0.0.1:8080] [--key KEY]`.

Needs `openai`, a server with a chat template and `--states FOLDER`. Prints a line a check; exits with 1 if one fails.
"""

import argparse
import concurrent.futures
import json
import sys
import time
import urllib.request

import openai

options = argparse.ArgumentParser()
options.add_argument("--url", default="http://127.0.0.1:8080")
options.add_argument("--key", default="any")
options = options.parse_args()
client = openai.OpenAI(base_url=options.url + "/v1", api_key=options.key, max_retries=0)
model = client.models.list().data[0].id
failed = []


def check(name, holds, seen=""):
    print(
        ("ok      " if holds else "FAILED  ") + name,
        "" if holds else repr(seen),
        flush=True,
    )
    if not holds:
        failed.append(name)


def chat(text, **more):
    more = {"temperature": 0, "max_tokens": 24} | more
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return client.chat.completions.create(model=model, messages=messages, **more)


def complete(prompt, **more):
    more = {"temperature": 0, "max_tokens": 16} | more
    return client.completions.create(model=model, prompt=prompt, **more)


def fails(kind, param, **request):
    try:
        complete(**({"prompt": "a"} | request))
    except openai.APIStatusError as e:
        check(
            f"{request} is {kind.__name__}",
            isinstance(e, kind) and e.body.get("param") == param,
            e.body,
        )
    else:
        check(f"{request} is {kind.__name__}", False, "no error")


def raw(method, path, data=None, kind="application/json"):
    headers = {"Authorization": "Bearer " + options.key, "Content-Type": kind}
    with urllib.request.urlopen(
        urllib.request.Request(options.url + path, data, headers, method=method)
    ) as answer:
        return answer.read()


question = "What is the capital of France?"
whole = chat(question)
check(
    "a chat is answered",
    whole.choices[0].message.role == "assistant" and whole.choices[0].message.content,
    whole,
)
check(
    "usage adds up",
    whole.usage.total_tokens
    == whole.usage.prompt_tokens + whole.usage.completion_tokens,
    whole.usage,
)
chunks = list(chat(question, stream=True))
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
check(
    "a stream is the same text", streamed == whole.choices[0].message.content, streamed
)
check(
    "its last chunk has the usage",
    chunks[-1].usage.completion_tokens == whole.usage.completion_tokens,
    chunks[-1],
)
parts = [{"role": "user", "content": [{"type": "text", "text": question}]}]
check("parts of text are text", chat(parts).choices[0].message.content == streamed)
scored = chat(question, logprobs=True, top_logprobs=2).choices[0]
tokens = scored.logprobs.content
check(
    "logprobs of a chat",
    "".join(t.token for t in tokens).startswith(streamed)
    and len(tokens[0].top_logprobs) == 2,
    tokens,
)
check(
    "greedy takes the likeliest",
    all(t.logprob == t.top_logprobs[0].logprob for t in tokens),
    tokens,
)
tool = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
check(
    "tools go to the template",
    chat(question, tools=[tool]).choices[0].message.content is not None,
)
check(
    "two answers",
    len({c.index for c in chat(question, n=2, temperature=1).choices}) == 2,
)

text = complete("1 2 3 4 5 6 7").choices[0].text
check("a completion", bool(text), text)
middle = text[2:5]
stopped = complete("1 2 3 4 5 6 7", stop=[middle]).choices[0]
check(
    "stop",
    stopped.text == text[: text.index(middle)] and stopped.finish_reason == "stop",
    stopped,
)
draw = lambda seed: complete("Once", temperature=1.0, seed=seed).choices[0].text
check("a seed gives the same text", draw(7) == draw(7) and draw(7) != draw(8))
echoed = complete("Once upon", echo=True, logprobs=1, max_tokens=0).choices[0]
check(
    "echo scores the prompt",
    echoed.text == "Once upon" and echoed.logprobs.token_logprobs[0] is None,
    echoed,
)
check("several prompts", len(complete(["a", "b", "c"]).choices) == 3)

fails(openai.NotFoundError, "model", extra_body={"model": "gpt"})
fails(openai.BadRequestError, "temperature", temperature=-1)
fails(openai.BadRequestError, "logprobs", logprobs=21)
fails(openai.BadRequestError, "suffix", suffix="end")
fails(openai.BadRequestError, "max_tokens", max_tokens=0)
fails(openai.NotFoundError, "state_id", extra_body={"state_id": "state-" + "0" * 32})

prompts = [f"Number {i}: once there was" for i in range(16)]
alone = [complete(prompt).choices[0].text for prompt in prompts]
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    together = list(pool.map(lambda prompt: complete(prompt).choices[0].text, prompts))
check(
    "sixteen at a time are those alone",
    alone == together,
    [a for a, b in zip(alone, together) if a != b],
)

stream = complete("a", max_tokens=100_000, stream=True)
next(iter(stream))
stream.close()
start = time.time()
complete("a", max_tokens=1)
check(
    "a client that leaves holds up nobody", time.time() - start < 5, time.time() - start
)

kept = chat("My name is Ada.", extra_body={"keep_state": True})
turns = [
    {"role": "user", "content": "My name is Ada."},
    {"role": "assistant", "content": kept.choices[0].message.content},
]
turns.append({"role": "user", "content": "What is my name?"})
on = chat([turns[-1]], extra_body={"state_id": kept.state_id})
check(
    "a kept conversation goes on",
    on.choices[0].message.content == chat(turns).choices[0].message.content,
    on,
)
check(
    "only the new turn is read",
    on.usage.prompt_tokens < chat(turns).usage.prompt_tokens,
    on.usage,
)
file = raw("GET", f"/v1/states/{kept.state_id}/content")
raw("DELETE", f"/v1/states/{kept.state_id}")
again = json.loads(raw("POST", "/v1/states", file, "application/octet-stream"))["id"]
back = chat([turns[-1]], extra_body={"state_id": again})
check(
    "a state that was taken away comes back",
    back.choices[0].message.content == on.choices[0].message.content,
    back,
)
sys.exit(1 if failed else 0)
