"""Twenty kills of each stage, drawn from a seed: ``python tests/soak/kills.py [--seed N] [--count N] [--folder DIR]``.

Each run is killed, goes on, and must end with the files, the manifest and the curve of the undisturbed one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("timing/", "perf/", "memory/")


def result(run: Path) -> tuple[Any, ...]:
    manifest = json.loads((run / "checkpoints/step_000006/manifest.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    curve = [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]
    return manifest, curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.folder or Path(tempfile.mkdtemp(prefix="kills"))
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    launcher = [sys.executable, ROOT / "tests/checkpoint/disturbed.py", out]
    subprocess.run([*launcher, str(arguments.seed), str(arguments.count), "kills"], check=True, env=environment)
    results = json.loads((out / "results.json").read_text())
    good = 0
    for kill in results["kills"] + results["rl_kills"]:
        same = result(out / kill["run"]) == result(out / ("rl_whole" if kill["run"].startswith("rl") else "whole"))
        fell = -9 in kill["killed"] and 0 not in kill["killed"] and kill["resumed"] == [0, 0]
        good += same and fell
        moment = f"{kill['run']}, {kill['kind']} of rank {kill['victim']} in step {kill['step']}"
        ended = f"killed {kill['killed']}, resumed {kill['resumed']}, {'same' if same else 'DIFFERS'}"
        print(f"{moment}: {ended}")
    total = 2 * arguments.count
    print(f"{good} of {total} killed runs end as the undisturbed one, bit for bit")
    sys.exit(good != total)


if __name__ == "__main__":
    main()
