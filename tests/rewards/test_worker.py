"""One worker process, spoken to over its pipes."""

import json
import signal
import subprocess
import sys

import pytest

WORKER = "ovr_megatron.rewards.worker"
MATHS = {"response": "\\boxed{\\sqrt{20}}", "answer": "2\\sqrt{5}", "options": []}


def run(*lines, flags=(), python=()):
    command = [sys.executable, *python, "-m", WORKER, *flags]
    asked = "".join(f"{line}\n" for line in lines)
    return subprocess.run(command, input=asked, capture_output=True, text=True, timeout=60)


def test_it_speaks_one_json_line_a_verdict_and_nothing_else():
    done = run(json.dumps(MATHS), json.dumps({"response": "no", "answer": "5"}))
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"ready": True},
        {"reason": "equal by math-verify", "box": "\\sqrt{20}", "score": None},
        {"reason": "no box", "box": None, "score": None},
    ]
    assert (done.returncode, done.stderr) == (0, "")


def test_it_never_imports_torch():
    done = run(json.dumps(MATHS), python=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"sympy", "math_verify", "antlr4"} <= imported
    assert not {name.split(".")[0] for name in imported} & {"torch", "vllm", "megatron", "transformers", "numpy"}


def test_it_ends_by_itself_where_nobody_kills_it():
    hostile = {"response": "\\boxed{9^{9^{9^{9^9}}}}", "answer": "\\sqrt{2}"}
    done = run(json.dumps(MATHS), json.dumps(hostile), json.dumps(MATHS), flags=["--timeout-s", "0.5"])
    assert done.returncode == -signal.SIGPROF
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(("mebibytes", "fits"), [(512, False), (4096, True)])
def test_memory_past_the_limit_is_refused(mebibytes, fits):
    code = f"from {WORKER} import limit_memory; limit_memory({mebibytes}); bytearray(1 << 30); print('fits')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ("fits" in done.stdout, "MemoryError" in done.stderr) == (fits, not fits)
