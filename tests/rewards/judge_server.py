"""A chat endpoint for tests, as a program of its own: it answers after a latency, and as the question demands.

    python tests/rewards/judge_server.py [--latency-s 0.2]

It prints its port. A question with REFUSE gets HTTP 400, GARBAGE no JSON, SILENT an answer without a verdict, SLOW
none ever, DENY HTTP 401, BUSY HTTP 503 the first time, SCORE=0.25 that verdict, any other 1. GET /asked lists what was
asked, in order of arrival, with the keys, and the requests in flight, now and at most. GET /hold keeps answers back
until GET /release, GET /release/32 lets that many go.
"""

import argparse
import asyncio
import json
import math
import re
import subprocess
import sys
import urllib.request

ASKED = []
KEYS = set()
IN_FLIGHT = {"now": 0, "most": 0}


class Gate:
    """Lets a number of answers pass; the others wait."""

    def __init__(self) -> None:
        self.allowed = math.inf
        self.changed = asyncio.Condition()

    async def enter(self) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.allowed > 0)
            self.allowed -= 1

    async def set(self, allowed: float) -> None:
        async with self.changed:
            self.allowed = allowed
            self.changed.notify_all()


GATE = Gate()


async def answer(body: dict, latency_s: float) -> tuple[int, str]:
    text = body["messages"][0]["content"]
    ASKED.append(text)
    times = ASKED.count(text) if "BUSY" in text else 0
    if "SLOW" in text:
        await asyncio.Event().wait()
    await GATE.enter()
    await asyncio.sleep(latency_s)
    if "REFUSE" in text:
        return 400, json.dumps({"error": "the content is refused"})
    if "DENY" in text:
        return 401, json.dumps({"error": "no such key"})
    if times == 1:
        return 503, json.dumps({"error": "busy"})
    if "GARBAGE" in text:
        return 200, "<html>502</html>"
    score = re.search(r"SCORE=([^\s<]+)", text)
    content = "I looked at it." if "SILENT" in text else f"So: <verdict>{score[1] if score else 'right'}</verdict>"
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return 200, json.dumps({"choices": [choice], "usage": {"total_tokens": 40}})


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency_s: float) -> None:
    try:
        while request := (await reader.readline()).decode():
            size = 0
            while (header := (await reader.readline()).decode().strip().lower()) != "":
                name, _, value = header.partition(": ")
                size = int(value) if name == "content-length" else size
                if name == "authorization":
                    KEYS.add(value)
            body = await reader.readexactly(size)
            path = request.split()[1]
            if path == "/asked":
                status, text = 200, json.dumps({"asked": ASKED, "keys": sorted(KEYS), **IN_FLIGHT})
            elif path == "/hold":
                await GATE.set(0)
                status, text = 200, "{}"
            elif path.startswith("/release"):
                await GATE.set(float(path.removeprefix("/release").removeprefix("/") or "inf"))
                status, text = 200, "{}"
            else:
                IN_FLIGHT["now"] += 1
                IN_FLIGHT["most"] = max(IN_FLIGHT["most"], IN_FLIGHT["now"])
                try:
                    status, text = await answer(json.loads(body), latency_s)
                finally:
                    IN_FLIGHT["now"] -= 1
            data = text.encode()
            writer.write(f"HTTP/1.1 {status} -\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


class Server:
    """The endpoint of `judge_server.py` in a process of its own."""

    def __init__(self, latency_s: float = 0.0):
        self.process = subprocess.Popen(self.command(latency_s), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    @staticmethod
    def command(latency_s: float = 0.0, port: int = 0) -> list[str]:
        return [sys.executable, __file__, "--latency-s", str(latency_s), "--port", str(port)]

    def report(self) -> dict:
        return self._get("asked")

    def hold(self) -> None:
        self._get("hold")

    def release(self, answers: int | None = None) -> None:
        self._get("release" if answers is None else f"release/{answers}")

    def _get(self, path: str) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}") as reply:
            return json.load(reply)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    server = await asyncio.start_server(
        lambda reader, writer: handle(reader, writer, args.latency_s), "127.0.0.1", args.port, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
