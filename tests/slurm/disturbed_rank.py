"""Python in the place of `OVR_PYTHON`: ranks that dawdle or never begin, as files in the folder ``DISTURBANCE`` say.

``absent``: the second rank of a run never begins.  ``brake``: as long as it is there, every engine step takes longer.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def brake(file: Path) -> None:
    from ovr_megatron.rollout.engine import RolloutEngine

    original = RolloutEngine.room_left

    def room_left(*args: Any) -> bool:
        if file.exists():
            time.sleep(1)
        return original(*args)

    RolloutEngine.room_left = room_left  # type: ignore[method-assign]


def main() -> None:
    folder, arguments = Path(os.environ["DISTURBANCE"]), sys.argv[1:]
    if arguments[0] != "-m":  # the pre-flight
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
        return
    if (folder / "absent").exists() and os.environ["SLURM_PROCID"] == "1":
        time.sleep(600)
    if arguments[1] == "ovr_megatron.rl":
        brake(folder / "brake")
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
