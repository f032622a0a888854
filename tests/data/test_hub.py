"""A model's name on the Hugging Face hub is a folder in Hugging Face's cache."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.data.hub import is_hub_name
from ovr_megatron.model.tiny import make_tiny_model

REVISION = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys
from ovr_megatron.data.hub import HubError, local_folder
for name in sys.argv[1:]:
    try:
        print(local_folder(name))
    except HubError as error:
        print(error)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds one model, as ``hf download`` leaves it."""
    model = tmp_path / "hub/models--org--tiny"
    make_tiny_model(model / "snapshots" / REVISION, tied=True, seed=1)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(REVISION)
    return tmp_path


def test_a_name_is_found_in_the_cache_or_refused_in_one_sentence(cache: Path) -> None:
    # The library reads its environment when it is imported.
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    names = ["org/tiny", "org/tiny@main", f"org/tiny@{REVISION}", "org/other", "org/tiny@v2"]
    command = [sys.executable, "-c", ASK, *names]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache)
    answers = result.stdout.splitlines()
    assert len(answers) == len(names), result.stderr[-2000:]
    snapshot = cache / "hub/models--org--tiny/snapshots" / REVISION
    assert answers[:3] == [str(snapshot)] * 3
    for name, answer in zip(names[3:], answers[3:], strict=True):
        assert answer.startswith(f"{name} is no folder on this machine, and the Hugging Face hub does not give it (")
        assert "hf download org/" in answer


def test_a_models_folder_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "snapshot", tied=True, seed=1)
    monkeypatch.setattr("ovr_megatron.data.hub.snapshot_download", lambda name, **options: str(tmp_path / "snapshot"))
    assert weights_of("org/tiny") == tmp_path / "snapshot"


def test_a_path_of_this_machine_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "org/model").mkdir(parents=True)
    assert is_hub_name("Qwen/Qwen2.5-VL-7B-Instruct")
    assert is_hub_name("Qwen/Qwen2.5-VL-7B-Instruct@main")
    # A mistyped run of this machine is not looked for elsewhere.
    for path in ("org/model", "runs/mistyped", "7B", "/data/model", "./model", "a/b/c"):
        assert not is_hub_name(path)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A server with the part of the hub's interface that a download asks for; counts the files that it sends."""
    model = make_tiny_model(tmp_path / "model", tied=True, seed=1)
    (model / "modeling.py").write_text("raise SystemExit")
    sent: Counter[str] = Counter()

    def entry(path: Path) -> dict[str, object]:
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": path.name}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(True)

        def do_HEAD(self) -> None:
            self.answer(False)

        def answer(self, with_body: bool) -> None:
            if self.path.startswith("/api/models/org/tiny/revision/main"):
                self.reply(json.dumps({"id": "org/tiny", "sha": REVISION}).encode(), {}, with_body)
                return
            if self.path.startswith(f"/api/models/org/tiny/tree/{REVISION}"):
                self.reply(json.dumps([entry(path) for path in model.iterdir()]).encode(), {}, with_body)
                return
            name = self.path.rpartition("/")[2]
            if not self.path.startswith("/org/tiny/resolve/") or not (model / name).is_file():
                self.send_error(404)
                return
            sent[name] += with_body
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": REVISION}
            self.reply((model / name).read_bytes(), headers, with_body)

        def reply(self, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(model=model, sent=sent, url=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_ranks_of_a_machine_download_a_model_once(hub: SimpleNamespace, tmp_path: Path) -> None:
    """Each file once for all processes, no code, into the cache that HF_HOME names."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        environment.pop(name, None)
    command = [sys.executable, "-c", ASK, "org/tiny"]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    answers = {rank.communicate(timeout=120)[0].strip() for rank in ranks}
    snapshot = tmp_path / "cache/hub/models--org--tiny/snapshots" / REVISION
    assert answers == {str(snapshot)}
    names = {path.name for path in hub.model.iterdir()} - {"modeling.py"}
    assert hub.sent == dict.fromkeys(names, 1)
    assert all((snapshot / name).read_bytes() == (hub.model / name).read_bytes() for name in names)
