"""``vllm serve EXPORT`` in the environment of the installer: it starts without this project, and answers a chat.

    .venv/bin/python tests/soak/serve.py

The export is that of a small random model, its sampling defaults those of training.  On a CPU vLLM compiles for
minutes.  Exit 1: the server ended, or gave no answer.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.config import DataConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.model.tiny import make_tiny_model

LIMIT_S = 1800


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: dict | None = None) -> dict:
    """Send ``body`` as JSON, or nothing, and return what comes back."""
    data = json.dumps(body).encode() if body else None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with opener.open(request, timeout=120) as answer:
        return json.loads(answer.read() or "{}")


def wait_for(server: subprocess.Popen, url: str) -> None:
    """Return when the server is up."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            ask(f"{url}/health")
            return
        except OSError:
            time.sleep(2)
    sys.exit(f"vllm serve ended with {server.poll()} or was not up after {LIMIT_S} s")


def main() -> None:
    """Export, serve, ask."""
    with tempfile.TemporaryDirectory() as folder:
        base, export = make_tiny_model(Path(folder) / "base"), Path(folder) / "export"
        write_hf_assets(export, Processor(base, DataConfig()))
        (base / "model.safetensors").rename(export / "model.safetensors")
        port = free_port()
        command = [
            Path(sys.executable).with_name("vllm"),
            "serve",
            export,
            "--port",
            str(port),
            "--max-model-len",
            "512",
        ]
        server = subprocess.Popen(command, cwd=folder)
        try:
            wait_for(server, f"http://127.0.0.1:{port}")
            chat = {"model": str(export), "max_tokens": 8, "messages": [{"role": "user", "content": "Add 1+2"}]}
            answer = ask(f"http://127.0.0.1:{port}/v1/chat/completions", chat)
        finally:
            server.terminate()
            server.wait(60)
        print(json.dumps(answer["choices"][0]["message"]["content"]))
        assert answer["usage"]["completion_tokens"] > 0


if __name__ == "__main__":
    main()
