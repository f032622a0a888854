"""Launch ranks as forks of one process that has imported the libraries, in place of ``torchrun``.

Torch, Megatron and vLLM take a core fifteen seconds to import, which a launch of four ranks would do four times.
tests/preload.py says what is imported.
"""

import functools
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

from ovr_megatron.runtime import environment
from tests.slurm.cluster import shell_environment

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["tests.preload"]


def launch(script: Path, *arguments: object, ranks: int, timeout_s: float = 900) -> None:
    """Run ``script`` on ``ranks`` processes of one group, or on one that is in no group where ``ranks`` is 0.

    Raises:
        AssertionError: a rank failed, with the end of what the ranks wrote, or they took longer than ``timeout_s``.
    """
    start_server()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        output = Path(folder) / "output"
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": free.getsockname()[1]}
        free.close()
        processes = []
        for rank in range(max(ranks, 1)):
            variables = {"RANK": rank, "LOCAL_RANK": rank, **group} if ranks else {}
            words = {name: str(value) for name, value in variables.items()}
            process = context.Process(target=_run, args=(script, list(map(str, arguments)), words, output))
            process.start()
            processes.append(process)
        codes = _join(processes, timeout_s)
        assert not any(codes), f"{script.name}: exit codes {codes}\n{output.read_text(errors='replace')[-5000:]}"


@functools.cache
def start_server() -> None:
    """Start the process that is forked, once, in the environment of a user's shell; no other thread may run."""
    previous = dict(os.environ)
    search = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    try:
        clean = shell_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search, "TOKENIZERS_PARALLELISM": "false"}
        clean |= {name: value for name, value in previous.items() if name.startswith("OVR_TEST_")}
        os.environ.clear()
        os.environ.update(clean)
        forkserver.set_forkserver_preload(LIBRARIES)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(previous)


def _run(script: Path, arguments: list[str], variables: dict[str, str], output: Path) -> None:
    """Run a script in this fork, as ``python SCRIPT`` does, with its output at the end of a file."""
    file = os.open(output, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    # Processes that a rank starts, such as graders, find the neighbours of the script, too.
    search = os.pathsep.join([str(script.parent), os.environ["PYTHONPATH"]])
    os.environ.update(variables, PYTHONPATH=search)
    environment.apply(os.environ)  # the import of the package has found no rank
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def _join(processes: list, timeout_s: float) -> list[int]:
    """Wait for all; where one fails or time is up, kill the others, which would wait for it."""
    deadline = time.monotonic() + timeout_s
    alive = {process.sentinel: process for process in processes}
    while alive and (seconds := deadline - time.monotonic()) > 0:
        ended = [alive.pop(sentinel) for sentinel in wait(list(alive), seconds)]
        if any(process.exitcode for process in ended):
            break
    for process in alive.values():
        process.join(5)  # it may be about to say why
        process.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
