"""Commands of ``ovr`` as forks of one process that has imported the libraries: ``python tests/forked.py SOCKET ...``.

`serve` starts that process.  The client hands its folder, environment and streams to a fork, in which the command runs
through its own entry point, and ends with the command's exit code.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 120.0  # of the import of the libraries


@contextlib.contextmanager
def serve(path: Path) -> Iterator[None]:
    """Have a process listen on the socket ``path`` within the block."""
    command = [sys.executable, __file__, "--serve", str(path)]
    server = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + LIMIT_S
    try:
        while not path.exists():
            assert server.poll() is None and time.monotonic() < deadline, "the libraries were not imported"
            time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def _listen(path: str) -> None:
    """Fork for every client; never returns."""
    import ovr_megatron.curation.prepare
    import ovr_megatron.data_checks
    import ovr_megatron.plan.report
    import ovr_megatron.verify  # noqa: F401
    import tests.preload  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path + ".new")
        listener.listen(8)
        os.rename(path + ".new", path)  # a client that sees it can connect
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run the command of a client in another fork and send its exit code."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(int(header), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        _become(request["words"], request["folder"], request["environment"], streams)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Turn this fork into the command; never returns."""
    for target, source in enumerate(streams):
        os.dup2(source, target)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ovr", *words]
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    code = 1
    try:
        runpy.run_module("ovr_megatron", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()  # as the interpreter does at the end of a command
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # whatever ended the command: a fork must not go on with the server's work


def _ask(path: str, words: list[str]) -> int:
    """Let the server run a command here; return its exit code."""
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [f"{len(body):8}".encode()], [0, 1, 2])
        connection.sendall(body)
        code = connection.recv(8)
    return abs(int(code)) if code else 1


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _listen(sys.argv[2])
    sys.exit(_ask(sys.argv[1], sys.argv[2:]))
