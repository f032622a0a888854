"""A chat endpoint for tests that fails, stalls, talks nonsense and counts."""

import contextlib
import json
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-7f3a"


class Teacher(ThreadingHTTPServer):
    """Answers "add A B" with thought and box.

    ``script`` maps a prompt to what its first requests get: a status, ``garbage``, ``empty``, ``drop`` (the connection
    ends), ``long`` (cut off), ``drip`` and ``drip head`` (a byte from time to time, without end), ``flood`` (more than
    any answer), ``redirect``, ``deep`` (JSON that no parser follows), or the ``usage`` to claim.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.retry_after = "0.02"
        self.script: dict[str, list[Any]] = defaultdict(list)
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Teacher

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        text = prompt if isinstance(prompt, str) else prompt[-1]["text"]
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.asked[text] += 1
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
            script = self.server.script[text] or self.server.script["*"]
            step = script.pop(0) if script else None
        threading.Event().wait(0.01)
        with self.server.lock:
            self.server.busy -= 1
        if self.headers["authorization"] != f"Bearer {KEY}":
            step = 401
        self.reply(step, body, text)

    def reply(self, step: Any, body: dict[str, Any], text: str) -> None:
        if step == "drop":
            self.connection.close()
            return
        if isinstance(step, int):
            self.send(step, json.dumps({"error": {"message": f"no, {self.headers['authorization']}"}}))
            return
        if step == "garbage":
            self.send(200, "<html>busy</html>")
            return
        if step in ("drip", "drip head", "flood"):
            self.trickle(step)
            return
        if step == "redirect":
            self.send_response(307)
            self.send_header("location", f"http://localhost:{self.server.server_address[1]}/v1/chat/completions")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        if step == "deep":
            self.send(200, "[" * 100_000)
            return
        a, b = map(int, text.split()[1:3])
        message = {"reasoning_content": f"{a} and {b} make {a + b}.", "content": f"It is \\boxed{{{a + b}}}."}
        if step == "empty":
            message["content"] = ""
        finish = "length" if step == "long" else "stop"
        usage = step if isinstance(step, dict) else {"total_tokens": 100}
        told = {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}
        self.send(200, json.dumps(told))

    def trickle(self, step: str) -> None:
        """Send without end, until the other side has gone."""
        with contextlib.suppress(OSError):
            if step == "drip head":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
            else:
                self.send_response(200)
                self.end_headers()
            while True:
                self.wfile.write(b" " * (1 << 20) if step == "flood" else b" ")
                self.wfile.flush()
                if step != "flood":
                    threading.Event().wait(0.05)

    def send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        if status == 429:
            self.send_header("retry-after", self.server.retry_after)
        self.end_headers()
        self.wfile.write(text.encode())
