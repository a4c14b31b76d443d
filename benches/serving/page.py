"""The server's page in a real headless Chromium, by keyboard: `python page.py [--url http://127.0.0.1:8080] [--shots FOLDER]`.

Needs `websockets`, Chromium, and a server with a chat template. Prints a line a check; exits with 1 if one fails.
"""

import argparse
import asyncio
import base64
import json
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

import websockets

options = argparse.ArgumentParser()
options.add_argument("--url", default="http://127.0.0.1:8080")
options.add_argument("--chromium", default="chromium")
options.add_argument("--port", type=int, default=9333)
options.add_argument("--shots")
options = options.parse_args()
failed = []


def check(name, holds, seen=""):
    print(("ok      " if holds else "FAILED  ") + name, "" if holds else repr(seen), flush=True)
    if not holds:
        failed.append(name)


class Page:
    """A tab, by Chromium's own protocol."""

    def __init__(self, socket):
        self.socket, self.count, self.complaints = socket, 0, []

    async def do(self, method, **parameters):
        self.count += 1
        number = self.count
        await self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(await self.socket.recv())
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                if message["params"].get("entry", {}).get("level") != "verbose":
                    self.complaints.append(message["params"])
            if message.get("id") == number:
                return message.get("result", message)

    async def value(self, expression):
        found = await self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    async def until(self, expression, seconds=60):
        for _ in range(seconds * 10):
            if await self.value(expression):
                return True
            await asyncio.sleep(0.1)
        return False

    async def key(self, key, modifiers=0):
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.do("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers, **text)

    async def write(self, text):
        await self.do("Input.insertText", text=text)

    async def shot(self, name):
        if options.shots:
            data = (await self.do("Page.captureScreenshot"))["data"]
            pathlib.Path(options.shots).mkdir(parents=True, exist_ok=True)
            pathlib.Path(options.shots, name + ".png").write_bytes(base64.b64decode(data))


TURNS = "[...document.querySelectorAll('article')].map(a => a.className + ':' + a.firstElementChild.textContent)"
IDLE = "document.getElementById('stop').disabled"


async def walk(page):
    for domain in ("Page", "Runtime", "Log"):
        await page.do(domain + ".enable")
    await page.do("Page.navigate", url=options.url + "/")
    check("the panel shows the slots", await page.until("/ of /.test(document.getElementById('slots').textContent)"))
    check("the cursor is in the message", await page.value("document.activeElement.id") == "text")
    await page.value("document.getElementById('temperature').value = 0")
    await page.write("What is the capital of France?")
    await page.key("Enter")
    check("it streams", await page.until(f"!{IDLE} || {TURNS}.length == 2"))
    check("and ends", await page.until(IDLE + f" && {TURNS}.length == 2"))
    turns = await page.value(TURNS)
    check("question and answer are there", turns[0] == "user:What is the capital of France?" and len(turns[1]) > 12, turns)
    check("the length is shown", "tokens" in await page.value("document.getElementById('length').textContent"))
    await page.shot("answered")
    await page.value("document.getElementById('max_tokens').value = 4000")
    await page.write("Tell me a very long story about a ship, a storm and a lighthouse, with many chapters.")
    await page.key("Enter")
    await page.until(f"({TURNS}[3] || '').length > 40")
    await page.key("Escape")
    check("Escape stops", await page.until(IDLE, 5))
    stopped = (await page.value(TURNS))[3]
    await asyncio.sleep(1)
    check("and nothing comes after", (await page.value(TURNS))[3] == stopped)
    await page.value("document.getElementById('max_tokens').value = 12")
    await page.value("document.querySelector('article:last-child nav button').click()")
    check("Retry writes the answer again", await page.until(IDLE + f" && {TURNS}[3] && {TURNS}[3] != {json.dumps(stopped)}"))
    await page.value("document.querySelector('article nav button').click()")
    check("Edit puts the cursor there", await page.value("document.activeElement.value") == "What is the capital of France?")
    await page.value("document.activeElement.value = 'Say hello.'")
    await page.key("Tab")
    await page.key("Enter")
    edited = await page.until(IDLE + f" && {TURNS}.length == 2 && {TURNS}[0] == 'user:Say hello.' && {TURNS}[1].length > 12")
    check("and the conversation goes on from there", edited, await page.value(TURNS))
    await page.do("Page.reload")
    check("a reload keeps it", await page.until(f"{TURNS}.length == 2 && {TURNS}[0] == 'user:Say hello.'"))
    await page.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    light = "getComputedStyle(document.body).color"
    check("dark mode is dark", await page.value(light) == "rgb(255, 255, 255)", await page.value(light))
    await page.shot("dark")
    await page.do("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    fits = "document.documentElement.scrollWidth <= 390"
    check("it fits a phone", await page.value(fits), await page.value("document.documentElement.scrollWidth"))
    await page.shot("phone")
    check("the console is empty", not page.complaints, page.complaints)


async def main():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--remote-debugging-port={options.port}"]
        browser = subprocess.Popen(
            [options.chromium, *flags, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(100):
                await asyncio.sleep(0.1)
                try:
                    tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{options.port}/json"))
                except OSError:
                    continue
                if tabs := [tab for tab in tabs if tab["type"] == "page"]:
                    break
            async with websockets.connect(tabs[0]["webSocketDebuggerUrl"], max_size=None) as socket:
                await walk(Page(socket))
        finally:
            browser.terminate()
            browser.wait()


asyncio.run(main())
sys.exit(1 if failed else 0)
