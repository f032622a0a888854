"""Print the results of examples/behaviours.sh, a line for each checkpoint: ``python behaviours_table.py RUN_DIR``."""

import json
import sys
from pathlib import Path
from typing import Any

CHECKPOINTS = ("base", "cold_start", "rl", "direct_cold_start", "direct_rl")
BEHAVIOURS = ("verification", "visual_verification", "backtracking", "visual_reflection")
HEAD = (
    "seed",
    "checkpoint",
    "images right",
    "texts right",
    *(name.replace("_", " ") for name in BEHAVIOURS),
    "right with backtracking",
    "right without",
    "transfer of backtracking",
)


def format_share(rates: Any, key: str) -> str:
    """Return ``rates[key]`` in percent with its interval, a dash where there is none."""
    if not rates or rates[key] is None:
        return "-"
    return f"{100 * rates[key]:.1f} ({100 * rates['low']:.0f}-{100 * rates['high']:.0f})"


def table_row(seed_dir: Path, name: str) -> list[str]:
    """Return the cells of one checkpoint."""
    scores = {}
    for form in ("visual", "text"):
        scores[form] = json.loads((seed_dir / "eval" / name / f"{form}.json").read_text())["greedy"]
    rates = json.loads((seed_dir / "behaviours/behaviours.json").read_text())["checkpoints"][name]
    split = rates["accuracy"]["backtracking"]
    return [
        seed_dir.name.removeprefix("seed"),
        name,
        format_share(scores["visual"], "accuracy"),
        format_share(scores["text"], "accuracy"),
        *(format_share(rates["behaviours"][behaviour]["emergence"], "rate") for behaviour in BEHAVIOURS),
        format_share(split["present"], "accuracy"),
        format_share(split["absent"], "accuracy"),
        format_share(rates["transfer"]["backtracking"], "value"),
    ]


def main(run_dir: Path) -> None:
    """Print the table of all seeds that have results."""
    rows = [list(HEAD), ["---"] * len(HEAD)]
    for result_path in sorted(run_dir.glob("seed*/behaviours/behaviours.json")):
        rows += [table_row(result_path.parents[1], name) for name in CHECKPOINTS]
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
