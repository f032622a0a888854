"""A converter killed at each of its writes in turn: ``kill_points.py HF WORK``, run by test_interrupted.py.

Every attempt is a forked process that kills itself when it opens or renames a file of the folder WORK for the n-th
time; between the attempts the readers look at what is left.
"""

import os
import runpy
import signal
import sys
from functools import partial
from pathlib import Path

from ovr_megatron.checkpoint import conversion
from ovr_megatron.checkpoint.manifest import CheckpointError, check
from ovr_megatron.data.hf_assets import check_assets
from ovr_megatron.families import ModelShape
from ovr_megatron.families.config_json import ShapeError
from ovr_megatron.weights import transfer
from ovr_megatron.weights.folder import WeightError, WeightFolder

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def kill_at(number, work):
    """Kill this process at its ``number``-th write below ``work``."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa")
        if (writes or event == "os.rename") and str(arguments[0]).startswith(str(work)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(main, arguments, number, work):
    """Run the converter up to its ``number``-th write; False if it came to its end."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        kill_at(number, work)
        try:
            main(arguments)
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"exit {os.waitstatus_to_exitcode(status)}"
    return status != 0


def accepted_checkpoint(folder):
    try:
        check(folder)
    except CheckpointError:
        return False
    return True


def accepted_model(folder):
    try:
        shape = ModelShape.from_hf(folder)
        with WeightFolder(folder) as weights:
            transfer.check_weights(weights, shape)
    except (ShapeError, WeightError):
        return False
    return True


def look(hf, out, work, fresh):
    """What no kill may leave: the result's name on anything, or anything that a reader takes and is not whole."""
    if fresh:
        assert not out.exists(), "it has its name"
        assert not [folder for folder in work.glob("[!.]*") if accepted_checkpoint(folder)]
    for folder in work.iterdir():
        if accepted_checkpoint(folder):
            assert transfer.differences(folder / "policy", hf) == [], folder
        if accepted_model(folder):
            assert not [line for line in transfer.differences(folder, hf) if ": only in" not in line], folder


def main(hf, work):
    os.fsync = lambda descriptor: None  # a kill does not lose what the kernel has
    check_assets(hf)  # Transformers is imported once, and not by every converter that is killed
    conversion.copy_weights = partial(conversion.copy_weights, shard_bytes=20_000)
    checkpoint, back = work / "checkpoint", work / "exported" / "back"
    for tool, out, arguments in (
        ("convert_from_hf", checkpoint, ["--hf", hf, "--out", checkpoint]),
        ("convert_from_hf", checkpoint, ["--hf", hf, "--out", checkpoint, "--force"]),
        ("convert_to_hf", back, ["--checkpoint", checkpoint, "--out", back, "--workers", 2]),
    ):
        convert = runpy.run_path(str(TOOLS / f"{tool}.py"))["main"]
        fresh, number = not out.exists(), 1
        while killed(convert, [str(argument) for argument in arguments], number, out.parent):
            look(hf, out, out.parent, fresh)
            number += 1
        assert not [path for path in out.parent.iterdir() if path.name.startswith(".")], "something is left over"
        print(tool, number - 1, flush=True)
    assert accepted_checkpoint(checkpoint)
    assert transfer.differences(back, hf) == []


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
