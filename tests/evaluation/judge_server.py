"""A model judge over HTTP that answers by a function, and misbehaves where it is told to."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-not-to-be-seen-91c2"


class Judge(ThreadingHTTPServer):
    """Answers with ``answer(question)``; ``script`` is what the first requests get instead.

    A step of the script is a status, "dies", "slow" (a second), or "guess", an answer that is none; None is an answer.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[str], str], script: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.script, self.asked = answer, script, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1#judge"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked += 1
            step = self.server.script.pop(0) if self.server.script else None
        if self.headers["authorization"] != f"Bearer {KEY}":
            step = 401
        if step == "dies":
            self.connection.close()
            return
        if step == "slow":
            time.sleep(1.0)
        content = "I would say three." if step == "guess" else self.server.answer(body["messages"][0]["content"])
        reply = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})
        status, reply = (step, f"no, {self.headers['authorization']}") if isinstance(step, int) else (200, reply)
        self.send_response(status)
        self.send_header("content-length", str(len(reply)))
        self.send_header("retry-after", "0.01")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who waited has gone
            self.wfile.write(reply.encode())
