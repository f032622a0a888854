"""From 200,000 samples to a trained checkpoint: ``python tests/soak/prepared.py [--rows N] [--folder DIR]``.

Generated problems of three kinds, and MATH500 where it is: every fourth of its problems is the evaluation set, so all
of those must go.  Prints rows kept by each stage, seconds and peak memory, and the losses of the training.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ovr_megatron.model.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
MATH500 = ROOT / "../shared/data/text/math500.json"
KINDS = ("puzzle:digits?form=text", "puzzle:ordering", "puzzle:countdown")
STAGES = ("collect", "dedup", "decontaminate", "patterns", "verify", "stratify", "weigh", "tokenise")


def write_math500(out: Path) -> list[str]:
    """Rows of MATH500 and the evaluation set made of every fourth; returns the two sources."""
    problems = json.loads(MATH500.read_text())
    (out / "evaluation.json").write_text(json.dumps(problems[::4]))
    with (out / "math.jsonl").open("w") as file:
        for number, problem in enumerate(problems):
            told = f"Let us work this out in steps, number {number}.</think>\\boxed{{{problem['final_answer']}}}"
            messages = [{"role": "user", "content": "Solve: " + problem["prompt"][0]["value"]}]
            messages.append({"role": "assistant", "content": told})
            file.write(json.dumps({"messages": messages, "answer": problem["final_answer"], "id": str(number)}) + "\n")
    return [f"{{path: {out}/math.jsonl, name: math}}", f"{{path: {out}/evaluation.json}}"]


def run(*command: object) -> float:
    """Run a Python command in the project's root, its output here; seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    out = (arguments.folder or Path(tempfile.mkdtemp(prefix="prepared"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    sources, model = [f"{{path: '{kind}'}}" for kind in KINDS], make_tiny_model(out / "model", tied=False, seed=1)
    settings = ["decontaminate.threshold=0.5"] if MATH500.is_file() else []
    if MATH500.is_file():
        math, evaluation = write_math500(out)
        sources.append(math)
        settings.append(f"decontaminate.sources=[{evaluation}]")
    command = ["tools/measure.py", "--out", out / "measured.json", sys.executable, "tools/prepare_data.py"]
    command += [
        "--config-name",
        "prepare_tiny",
        f"dir={out}/prepared",
        f"model={model}",
        f"workers={arguments.workers}",
    ]
    command += [
        f"stages=[{','.join(STAGES)}]",
        f"collect.limit={arguments.rows // len(KINDS)}",
        "data.pack_tokens=2048",
    ]
    seconds = run(*command, f"data.sources=[{','.join(sources)}]", *settings)
    if MATH500.is_file():
        rows = [json.loads(line) for line in (out / "prepared/decontaminate/rows.jsonl").open()]
        planted = {row["id"] for row in rows if row["source"] == "math"} & {str(number) for number in range(0, 500, 4)}
        print(f"planted problems of MATH500 that are left: {len(planted)} of 125")
        assert not planted
    training = ("-m", "ovr_megatron.coldstart", "--config-name", "tiny_cold_start", f"run.dir={out}/run")
    training += (f"model.path={model}", f"data.tokenised={out}/prepared/tokenise/set", "data.sources=[]")
    training += ("data.max_prompt_tokens=512",)
    trained = run(*training, f"steps={arguments.steps}")
    curve = [json.loads(line) for line in (out / "run/metrics/train.jsonl").open()]
    last = out / f"run/checkpoints/step_{arguments.steps:06}/manifest.json"
    assert last.is_file() and len(curve) == arguments.steps
    peak = json.loads((out / "measured.json").read_text())["peak_memory_bytes"]
    print(f"preparation {seconds:.0f} s, peak {peak / 1e9:.2f} GB; {arguments.steps} steps {trained:.0f} s")
    print(f"loss {curve[0]['loss/train']:.3f} -> {curve[-1]['loss/train']:.3f}")


if __name__ == "__main__":
    main()
