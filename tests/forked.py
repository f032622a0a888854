"""An interpreter whose processes are forks of one that has imported the libraries.

`start` starts that process and writes the interpreter, ``python tests/forked.py SOCKET ...``.  With ``-m MODULE ...``
or ``SCRIPT ...`` it hands its folder, environment and streams to a fork, passes on the signals that it gets, and ends
as the fork does; where it is killed, the fork is killed, too.  What the command starts with `sys.executable` is a fork
again.  Other arguments, and the modules of `UNFORKED`, go to the interpreter of the tests.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
# Graders and judges have limits of memory, and slurm/launch.sh looks for the children of torchrun.
UNFORKED = ("ovr_megatron.rewards.", "torch.distributed.run")
LIMIT_S = 120.0  # of the import of the libraries
_server = contextlib.ExitStack()
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@functools.cache
def start() -> Path:
    """Start the process that is forked, in the environment of a user's shell; return the interpreter."""
    from tests.slurm.cluster import shell_environment

    # In a folder of its own: the path of a socket has at most 107 characters.
    folder = Path(_server.enter_context(tempfile.TemporaryDirectory()))
    path, python = folder / "socket", folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {path} "$@"\n')
    python.chmod(0o755)
    search = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": search, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--serve", str(path)]
    process = subprocess.Popen(command, env=shell_environment() | variables)
    _server.callback(process.wait)
    _server.callback(process.kill)
    atexit.register(stop)
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the libraries were not imported"
        time.sleep(0.1)
    return python


def stop() -> None:
    """End the process that is forked, where there is one."""
    _server.close()


def _listen(path: str) -> None:
    """Fork for every client until the process of the tests has ended."""
    import tests.preload  # noqa: F401

    parent = os.getppid()
    sys.executable = str(Path(path).with_name("python"))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path + ".new")
        listener.listen(8)
        os.rename(path + ".new", path)  # a client that sees it can connect
        listener.settimeout(1)
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run the command of a client in another fork, send it the client's signals and send back its exit code."""
    header, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(int(header), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        connection.close()
        _become(request["words"], request["folder"], request["environment"], streams)
    os.setpgid(child, child)  # here, too: whichever comes first
    for stream in streams:
        os.close(stream)
    end = os.pidfd_open(child)
    while end not in select.select([connection, end], [], [])[0]:
        numbers = connection.recv(64)
        if not numbers:  # the client was killed
            os.killpg(child, signal.SIGKILL)  # it is there until `waitpid`
            break
        for number in numbers:
            os.kill(child, number)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _become(words: list[str], folder: str, variables: dict[str, str], streams: list[int]) -> NoReturn:
    """Turn this fork into the command; never returns."""
    from ovr_megatron.runtime import environment

    os.setpgid(0, 0)
    for target, source in enumerate(streams):
        os.dup2(source, target)
        os.close(source)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    environment.apply(os.environ)  # the import of the package has found no rank
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    neighbours = folder if is_module else str(Path(words[0]).resolve().parent)
    sys.path[:0] = [neighbours, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    if is_module:
        run_to_exit(lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True))
    run_to_exit(lambda: runpy.run_path(words[0], run_name="__main__"))


def run_to_exit(command: Callable[[], object]) -> NoReturn:
    """Run a command in this fork, and end the fork with the exit code and the output of an interpreter's end."""
    code = 1
    try:
        command()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # whatever ended the command: a fork must not go on with the work of its parent


def _ask(path: str, words: list[str]) -> int:
    """Let the server run a command here; return its exit code, negative for the signal that ended it."""
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    body = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [f"{len(body):8}".encode()], [0, 1, 2])
        connection.sendall(body)
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
        code = connection.recv(8)
    return int(code) if code else 1


def main() -> None:
    """Serve, or run a command in a fork, or leave it to the interpreter of the tests."""
    path, *words = sys.argv[1:]
    if path == "--serve":
        _listen(words[0])
        return
    kind, target, *_ = [*words, "", ""]
    if not ((kind == "-m" and not target.startswith(UNFORKED)) or kind.endswith(".py")):
        os.execv(sys.executable, [sys.executable, *words])
    code = _ask(path, words)
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
