"""Run vLLM in ``engines`` processes of its own, so that its memory is free afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

from ovr_megatron import config as configuration
from ovr_megatron.curation.stage import Work
from ovr_megatron.errors import UserError
from ovr_megatron.runtime.environment import child_environment

MODULE = "ovr_megatron.curation.engine_process"
JOB = "job.yaml"


class EngineError(UserError, RuntimeError):
    """A process with vLLM failed; the message ends with its last lines of output."""


def engine_files(task: str) -> tuple[str, ...]:
    """Return the names of the files that `run_engines` writes into a stage's folder."""
    return (JOB, f"{task}.log")


def run_engines(work: Work, task: str) -> None:
    """Run ``task`` (score, answer, attempt) of `ovr_megatron.curation.engine_process` on the rows of ``work``.

    Raises:
        EngineError: a process failed; shows its last lines and the path of its log.
    """
    job = work.folder / JOB
    configuration.save(work.config, job)
    log = work.folder / f"{task}.log"
    command = [sys.executable, "-m", MODULE]
    if work.config.engines > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={work.config.engines}")
        command = [sys.executable, *launcher, "-m", MODULE]
    with log.open("wb") as file:
        process = subprocess.run(
            [*command, task, str(job), str(work.input_folder)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=child_environment(os.environ),
        )
    if process.returncode:
        lines = log.read_text(errors="replace").splitlines()
        # The process prints user errors on one line; without one the last lines have the traceback.
        errors = [line for line in lines if line.startswith("error: ")] or lines[-15:]
        tail = "\n".join(errors[-15:])
        raise EngineError(f"{task}: vLLM's process ended with code {process.returncode} ({log}): {tail}")
    # A failure leaves the file behind, with which the process can be started again by hand.
    job.unlink()
