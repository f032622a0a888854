"""Launch ranks as forks of one process that has imported the libraries, in place of ``torchrun``: see tests/forked.py.

Torch, Megatron and vLLM take a core fifteen seconds to import, which a launch of four ranks would do four times.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import forked
from tests.slurm.cluster import shell_environment

ROOT = Path(__file__).resolve().parents[1]


def launch(script: Path, *arguments: object, ranks: int, timeout_s: float = 900) -> None:
    """Run ``script`` on ``ranks`` processes of one group, or on one that is in no group where ``ranks`` is 0.

    The environment is that of a user's shell.

    Raises:
        AssertionError: a rank failed, with the end of what the ranks wrote, or they took longer than ``timeout_s``.
    """
    command = [forked.start(), script, *map(str, arguments)]
    # Processes that a rank starts, such as graders, find the neighbours of the script, too.
    search = os.pathsep.join([str(script.parent), str(ROOT), *filter(None, sys.path)])
    variables = shell_environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search, "TOKENIZERS_PARALLELISM": "false"}
    variables |= {name: value for name, value in os.environ.items() if name.startswith("OVR_TEST_")}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        output = Path(folder) / "output"
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": f"{ranks}", "LOCAL_WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1"}
        group |= {"MASTER_PORT": f"{free.getsockname()[1]}"}
        free.close()
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        processes = []
        with output.open("ab") as file:
            for rank in range(max(ranks, 1)):
                places = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", **group} if ranks else {}
                processes.append(subprocess.Popen(command, env=variables | places, stdout=file, **streams))
        codes = _join(processes, timeout_s)
        assert not any(codes), f"{script.name}: exit codes {codes}\n{output.read_text(errors='replace')[-5000:]}"


def _join(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Wait for all; where one fails or time is up, kill the others, which would wait for it."""
    deadline = time.monotonic() + timeout_s
    codes = [process.poll() for process in processes]
    while None in codes and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.02)
        codes = [process.poll() for process in processes]
    for process in processes:
        try:
            process.wait(5)  # it may be about to say why
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]
