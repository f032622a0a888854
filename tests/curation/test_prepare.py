"""The tool itself on puzzles and MATH500: planted problems go, wrong answers go, the rest stays, in a real recipe."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ovr_megatron.config import ConfigError
from ovr_megatron.curation.prepare import check_folder
from ovr_megatron.model.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
MATH500 = ROOT / "../shared/data/text/math500.json"
STAGES = "[collect,dedup,decontaminate,patterns,verify,stratify,weigh,tokenise]"
LONG = "data.max_prompt_tokens=512"
KINDS = ("puzzle:digits?form=text", "puzzle:ordering", "puzzle:countdown")


def run(python: Path, *command: str) -> str:
    done = subprocess.run([python, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def prepare(python: Path, out: Path, model: Path, *settings: str) -> str:
    recipe = ("tools/prepare_data.py", "--config-name", "prepare_tiny", f"dir={out}", f"model={model}")
    return run(python, *recipe, f"stages={STAGES}", "collect.limit=700", "data.pack_tokens=1024", *settings)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "manifest.json", "summary.json"])
def test_the_folder_of_a_model_or_a_run_is_refused(tmp_path: Path, name: str) -> None:
    check_folder(tmp_path, ["collect"])
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"has {name}, which no preparation has written; give a new folder"):
        check_folder(tmp_path, ["collect"])


@pytest.mark.skipif(not MATH500.is_file(), reason=f"{MATH500} is not there")
def test_puzzles_and_math500_go_through_the_recipe(loaded_python: Path, tmp_path: Path) -> None:
    """Every fourth problem of MATH500 is the evaluation set; every tenth row of the rest has a wrong answer."""
    problems = json.loads(MATH500.read_text())
    (tmp_path / "eval.json").write_text(json.dumps(problems[::4]))
    with (tmp_path / "math.jsonl").open("w") as file:
        for number, problem in enumerate(problems):
            told = f"Let us work this out in steps, number {number}.</think>\\boxed{{{problem['final_answer']}}}"
            if number % 10 == 1:
                told = told.replace("boxed{", "boxed{17017 + ")
            messages = [{"role": "user", "content": "Solve: " + problem["prompt"][0]["value"].upper()}]
            messages.append({"role": "assistant", "content": told})
            file.write(json.dumps({"messages": messages, "answer": problem["final_answer"], "id": str(number)}) + "\n")
    sources = ",".join([f"{{path: '{kind}'}}" for kind in KINDS] + [f"{{path: {tmp_path}/math.jsonl, name: math}}"])
    settings = [f"data.sources=[{sources}]", f"decontaminate.sources=[{{path: {tmp_path}/eval.json}}]"]
    settings.append("decontaminate.threshold=0.5")
    out, model = tmp_path / "out", make_tiny_model(tmp_path / "model", tied=False, seed=1)
    said = prepare(loaded_python, out, model, *settings)
    assert said.splitlines()[-1] == f"prepared: {out}/tokenise"
    before, after = rows(out / "dedup"), rows(out / "decontaminate")
    gone = {row["id"] for row in before} - {row["id"] for row in after}
    assert gone == {str(number) for number in range(0, 500, 4)}
    verified = {row["id"] for row in rows(out / "verify") if row["source"] == "math"}
    assert not verified & {str(number) for number in range(1, 500, 10)}
    assert len(verified) >= 320  # of 325 right ones; a grader that misses some of its own answers is another test's
    groups = json.loads((out / "tokenise/groups.json").read_text())
    assert {group["name"].rpartition("/d")[0] for group in groups} == {row["source"] for row in before}
    told = json.loads((out / "tokenise/report.json").read_text())
    assert told["samples"] + told["skipped"] == sum(group["rows"] for group in groups) > 1500 > 20 * told["skipped"]
    training = (
        "-m",
        "ovr_megatron.coldstart",
        "--config-name",
        "tiny_cold_start",
        f"run.dir={tmp_path}/run",
        "steps=2",
    )
    run(loaded_python, *training, f"model.path={model}", f"data.tokenised={out}/tokenise/set", "data.sources=[]", LONG)
    curve = [json.loads(line) for line in (tmp_path / "run/metrics/train.jsonl").read_text().splitlines()]
    assert len(curve) == 2 and (tmp_path / "run/checkpoints/step_000002/manifest.json").is_file()
    assert {name for row in curve for name in row if "math/d" in name}, "the losses of the groups are told apart"
    assert "done before" in prepare(loaded_python, out, model, *settings, "weigh.power=0.7").splitlines()[0]
