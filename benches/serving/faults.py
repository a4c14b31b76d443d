"""What a server does when clients, disks or its own process fail: `python faults.py --liger target/release/liger --model MODEL`.

Starts the server itself, on a model of fixed-size states (`liger convert`). Prints a line a check; exits with 1 if one fails. A full disk is
tried with `--full FOLDER`, a folder on a small file system with less room than one state (as root: mount -t tmpfs -o size=1m none FOLDER).
"""

import argparse
import json
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

options = argparse.ArgumentParser()
options.add_argument("--liger", default="target/release/liger")
options.add_argument("--model", required=True)
options.add_argument("--port", type=int, default=8124)
options.add_argument("--full")
options = options.parse_args()
here, failed = ("127.0.0.1", options.port), []
# Ten thousand connections are ten thousand files on either side.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def check(name, holds, seen=""):
    print(("ok      " if holds else "FAILED  ") + name, "" if holds else repr(seen), flush=True)
    if not holds:
        failed.append(name)


def start(states):
    command = [options.liger, "serve", options.model, "--port", str(options.port), "--states", states, "--slots", "4"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            if raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200"):
                return server
        except OSError:
            time.sleep(0.1)
    sys.exit("the server does not start")


def raw(data, seconds=30):
    """All that comes back; what was sent is not looked after."""
    with socket.create_connection(here, timeout=seconds) as s:
        answer = b""
        try:
            s.sendall(data)
            while piece := s.recv(65536):
                answer += piece
        except OSError as e:
            answer += b"<" + type(e).__name__.encode() + b">"
    return answer


def post(body, path="/v1/completions"):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    return raw(head.encode() + body)


def ask(**body):
    body = {"temperature": 0, "max_tokens": 16} | body
    request = urllib.request.Request(f"http://127.0.0.1:{options.port}/v1/completions", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        return json.load(e)


def refused(name, answer, status):
    check(name, answer.startswith(b"HTTP/1.1 %d" % status) and (b'"error"' in answer or status == 431), answer[:300])


with tempfile.TemporaryDirectory() as states:
    server = start(states)
    refused("JSON that ends early", post(b'{"prompt": "a'), 400)
    refused("UTF-8 cut in half", post(b'{"prompt": "\xc3"}'), 400)
    refused("lists in lists in lists", post(b'{"prompt":' + b"[" * 100_000 + b"}"), 400)
    refused("10 MB", post(b'{"prompt": "' + b"a" * 10_000_000 + b'"}'), 413)
    refused("a head of 1 MB", raw(b"GET /health HTTP/1.1\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n"), 431)
    check("no HTTP at all", raw(b"\x00\xff\x01 nonsense\r\n\r\n").startswith(b"HTTP/1.1 400"))

    slow = [socket.create_connection(here) for _ in range(200)]
    for s in slow:
        s.send(b"POST /v1/completions HTTP/1.1\r\n")
    body = b'{"prompt":"a","max_tokens":100000,"stream":true}'
    for i in range(50):
        with socket.create_connection(here) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            if i % 2:
                s.recv(10)
    begun = time.time()
    while "error" in (answer := ask(prompt="a", max_tokens=2)) and time.time() < begun + 30:
        time.sleep(0.2)
    check("50 clients that vanished and 200 that say nothing hold up nobody", "choices" in answer and time.time() < begun + 10, answer)
    slow[0].settimeout(30)
    try:
        slow[0].recv(100)
        check("who says nothing is cut off", True)
    except TimeoutError as e:
        check("who says nothing is cut off", False, e)
    for s in slow:
        s.close()

    many = []
    try:
        while len(many) < 10_000:
            many.append(socket.create_connection(here, timeout=5))
    except OSError as e:
        check("10,000 connections", False, (len(many), e))
    many[-1].settimeout(5)
    check("the last of 10,000 connections is told why", many[-1].recv(200).startswith(b"HTTP/1.1 503"))
    for s in many:
        s.close()
    time.sleep(1)
    check("and afterwards all is well", "choices" in ask(prompt="a", max_tokens=2))

    kept = ask(prompt="Once upon a time", keep_state=True)
    expected = ask(prompt=" there", state_id=kept["state_id"])["choices"]
    stream = socket.create_connection(here)
    stream.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    stream.recv(200)
    server.send_signal(signal.SIGKILL)
    server.wait()
    stream.close()
    server = start(states)
    found = ask(prompt=" there", state_id=kept["state_id"])
    check("states outlive a kill in the middle of a stream", found.get("choices") == expected, found)

    stream = socket.create_connection(here)
    body = b'{"prompt":"a","max_tokens":60,"stream":true,"temperature":0}'
    stream.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    got = stream.recv(200)
    server.send_signal(signal.SIGTERM)
    while piece := stream.recv(65536):
        got += piece
    check("SIGTERM finishes what has begun", b"[DONE]" in got and server.wait(30) == 0, got[-200:])

if options.full:
    server = start(options.full)
    answer = ask(prompt="a", keep_state=True)
    check("a full disk: the answer comes, and why its state does not", answer.get("state_error") and answer["choices"][0]["text"], answer)
    check("and the server goes on", "choices" in ask(prompt="a"))
    server.terminate()
    server.wait()
sys.exit(1 if failed else 0)
