"""Kills drawn from a seed: ``python tests/soak/kills.py [--modes MODE...] [--seed N] [--count N] [--folder DIR]``.

Each run is killed, goes on, and must end with the files, the manifest, the curve and the archived responses of the
undisturbed one.  Modes are those of ``tests/checkpoint/kills.py``: the two stages (``sft``, ``rl``), rounds with
tail batching and a long round (``tail``), responses that go on under new weights (``partial``), ranks that only
generate in turn with the others (``turns``), one iteration ahead (``ahead``) or two (``further``), one ahead with
responses that go on under new weights (``in_flight``), and in turn with responses that come in parts (``parts``).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("timing/", "perf/", "memory/")
MODES = ("sft", "rl", "tail", "partial", "turns", "ahead", "further", "in_flight", "parts")


def result(run: Path) -> tuple[Any, ...]:
    manifest = json.loads((run / "checkpoints/step_000006/manifest.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    curve = [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]
    archive = {}
    for path in sorted((run / "rollouts").rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            archive[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return manifest, curve, archive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=20, help="of each mode")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.folder or Path(tempfile.mkdtemp(prefix="kills"))
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    launcher = [sys.executable, ROOT / "tests/checkpoint/disturbed.py", out]
    command = [*launcher, str(arguments.seed), str(arguments.count), *arguments.modes]
    subprocess.run(command, check=True, env=environment)
    results = json.loads((out / "results.json").read_text())
    good = 0
    for mode in arguments.modes:
        for kill in results[mode]:
            same = result(out / kill["run"]) == result(out / kill["whole"])
            fell = -9 in kill["killed"] and 0 not in kill["killed"] and kill["resumed"] == [0, 0]
            good += same and fell
            moment = f"{kill['run']}, {kill['kind']} of rank {kill['victim']} in step {kill['step']}"
            ended = f"killed {kill['killed']}, resumed {kill['resumed']}, {'same' if same else 'DIFFERS'}"
            print(f"{moment}: {ended}")
    total = len(arguments.modes) * arguments.count
    print(f"{good} of {total} killed runs end as the undisturbed one, bit for bit")
    sys.exit(good != total)


if __name__ == "__main__":
    main()
