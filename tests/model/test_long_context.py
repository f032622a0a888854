"""The angles of positions past 40,000, in a document short enough for every run; the long one is tests/soak's."""

import json
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "soak" / "long_context.py"


@pytest.mark.parametrize("yarn", [None, 2], ids=["plain", "yarn"])
def test_logits_and_gradients_are_transformers_past_40000_positions(loaded_python: Path, yarn: int | None) -> None:
    options = ["--tokens", "120", "--gap", "40000", *(["--yarn", str(yarn)] if yarn else [])]
    result = subprocess.run([loaded_python, SCRIPT, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode in (0, 1), result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["passed"], report
    assert report["positions"] > 40000
    assert yarn is None or report["without_yarn"] > 1, "YaRN must matter here"
