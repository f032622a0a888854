"""Models, checkpoints, sets, rewards and arguments that cannot be used, for tests/soak/bad_inputs.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bad_input_case import Case
from bad_input_rows import TEXT_ROW, THOUGHT
from bad_input_settings import COLD_START, RL
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], None]
SET = ("-m", "ovr_megatron.coldstart", "--config-name", "tiny_cold_start", "run.dir={tmp}/run", "model.path={model}")
SET += ("steps=1", "data.sources=[]", "data.tokenised={tmp}/set")


def config(**values: Any) -> Edit:
    """Return an edit that changes ``config.json``; None takes a key out."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        for key, value in values.items():
            holder = raw
            *groups, last = key.split("__")
            groups = [group for group in groups if group != "text_config" or group in raw]  # older files are flat
            for group in groups:
                holder = holder.setdefault(group, {})
            if value is None:
                holder.pop(last, None)
            else:
                holder[last] = value
        path.write_text(json.dumps(raw))

    return edit


def write(name: str, content: str | bytes) -> Edit:
    """Return an edit that overwrites a file."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def template(text: str) -> Edit:
    """Return an edit that replaces the chat template in the file that Transformers' processor prefers."""
    return write("chat_template.json", json.dumps({"chat_template": text}))


def remove(*patterns: str) -> Edit:
    """Return an edit that removes files."""

    def edit(folder: Path) -> None:
        for pattern in patterns:
            paths = list(folder.glob(pattern))
            assert paths, f"nothing is called {pattern}"
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def cut(name: str, share: float = 0.5) -> Edit:
    """Return an edit that keeps the beginning of a file."""

    def edit(folder: Path) -> None:
        (path,) = folder.glob(name)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return edit


def flip(name: str) -> Edit:
    """Return an edit that changes the last byte of a file."""

    def edit(folder: Path) -> None:
        path = sorted(folder.glob(name))[0]
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(bytes(content))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Edit:
    """Return an edit of the tensors of ``model.safetensors``."""

    def edit(folder: Path) -> None:
        (path,) = folder.rglob("model.safetensors")
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})

    return edit


def rename(before: str, after: str) -> Edit:
    """Return an edit that renames a part of every tensor's name."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.replace(before, after)] = weights.pop(name)

    return tensors(change)


def fill(part: str, value: float) -> Edit:
    """Return an edit that puts one value into every tensor whose name has ``part``."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if part in name:
                weights[name].view(-1)[0] = value

    return tensors(change)


def drop(part: str) -> Edit:
    """Return an edit that leaves out every tensor whose name has ``part``."""

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            if part in name:
                del weights[name]

    return tensors(change)


def narrow(weights: dict[str, torch.Tensor]) -> None:
    """Take a row off the first matrix."""
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name] = weights[name][:-1].clone()


MODELS: dict[str, tuple[Edit, str]] = {
    "no config.json": (remove("config.json"), "config.json"),
    "a config that is no JSON": (write("config.json", "{"), "config.json"),
    "a config that is a list": (write("config.json", "[]"), "config.json"),
    "a config of another family": (config(model_type="llama", architectures=["LlamaForCausalLM"]), "llama"),
    "no layers": (config(text_config__num_hidden_layers=0), "num_hidden_layers"),
    "layers that are a text": (config(text_config__num_hidden_layers="four"), "num_hidden_layers"),
    "more layers than weights": (config(text_config__num_hidden_layers=7), "layers"),
    "a negative width": (config(text_config__hidden_size=-128), "hidden_size"),
    "heads that do not divide": (config(text_config__num_attention_heads=3), "heads"),
    "key-value heads that do not divide": (config(text_config__num_key_value_heads=3), "heads"),
    "another activation": (config(text_config__hidden_act="relu"), "hidden_act"),
    "a sliding window": (
        config(
            text_config__use_sliding_window=True,
            text_config__sliding_window=64,
            text_config__max_window_layers=0,
            text_config__layer_types=None,
        ),
        "sliding",
    ),
    "no positions": (config(text_config__max_position_embeddings=0), "max_position_embeddings"),
    "a rope base of 0": (config(text_config__rope_theta=0, text_config__rope_parameters__rope_theta=0), "rope"),
    "a norm epsilon of -1": (config(text_config__rms_norm_eps=-1), "rms_norm_eps"),
    "another vocabulary": (config(text_config__vocab_size=100, vocab_size=100), "vocab"),
    "no vision tower": (config(vision_config=None), "vision"),
    "a patch of 0 pixels": (config(vision_config__patch_size=0), "patch_size"),
    "no weights": (remove("*.safetensors"), "safetensors"),
    "weights cut short": (cut("model.safetensors"), "safetensors"),
    "weights that are a text": (write("model.safetensors", "hello"), "safetensors"),
    "weights of zero bytes": (write("model.safetensors", b""), "safetensors"),
    "a lost tensor": (drop("layers.1.mlp.down_proj"), "down_proj"),
    "a lost vision tower": (drop("visual."), "visual"),
    "a tensor of another shape": (tensors(narrow), "q_proj"),
    "names with a prefix": (rename("model.", "base_model.model.model."), "base_model"),
    "a number that is none": (fill("q_proj.weight", float("nan")), "q_proj"),
    "an infinite number": (fill("embed_tokens", float("inf")), "embed_tokens"),
    "an index of lost shards": (
        write("model.safetensors.index.json", json.dumps({"weight_map": {"model.norm.weight": "model-9.safetensors"}})),
        "model-9.safetensors",
    ),
    "no tokenizer": (remove("tokenizer*", "vocab*", "merges*"), "tokenizer"),
    "a tokenizer that is no JSON": (write("tokenizer.json", "{"), "tokenizer"),
    "a tokenizer of another kind": (write("tokenizer.json", "{}"), "tokenizer"),
    "a template that is no template": (template("{% for %}"), "template"),
    "a template that says nothing": (template(" "), "template"),
    "a template that raises": (template("{{ raise_exception('no') }}"), "template"),
    "image settings that are no JSON": (write("preprocessor_config.json", "{"), "preprocessor_config.json"),
    "image settings of another model": (
        write("preprocessor_config.json", json.dumps({"image_processor_type": "CLIPImageProcessor"})),
        "processor",
    ),
}


def copied(name: str, edit: Edit) -> Callable[[Path, dict[str, Path]], None]:
    """Return an edit of a copy ``{tmp}/name`` of the sound input of that name."""

    def apply(folder: Path, sound: dict[str, Path]) -> None:
        shutil.copytree(sound[name], folder / name)
        edit(folder / name)

    return apply


def model_cases() -> Iterator[Case]:
    """Yield damaged model folders, under three commands in turn."""
    cold_start = tuple(word.replace("{model}", "{tmp}/model") for word in COLD_START)
    tokenise = ("tools/tokenise.py", "{tmp}/set", "--model", "{tmp}/model", "data.sources=[{path: {rows}}]")
    weights_only = ("weights", "tensor", "tower", "names", "number", "shards", "layers than")
    for name, (edit, says) in MODELS.items():
        about_weights = any(word in name for word in weights_only)
        # Without this the project's own template is taken, and that of the folder does not matter.
        template_setting = ("data.template=model",) if "template" in name else ()
        yield Case("models", f"train: {name}", (*cold_start, *template_setting), says, edits=(copied("model", edit),))
        if about_weights:
            command = ("tools/convert_from_hf.py", "--hf", "{tmp}/model", "--out", "{tmp}/out")
            yield Case("models", f"import: {name}", command, says, edits=(copied("model", edit),))
        elif "token" in name or "template" in name or "config" in name:
            yield Case(
                "models", f"tokenise: {name}", (*tokenise, *template_setting), says, edits=(copied("model", edit),)
            )


CHECKPOINTS: dict[str, tuple[Edit, str]] = {
    "no manifest": (remove("manifest.json"), "manifest"),
    "a manifest that is no JSON": (write("manifest.json", "{"), "manifest"),
    "a manifest that is a list": (write("manifest.json", "[]"), "manifest"),
    "a manifest of nothing": (write("manifest.json", "{}"), "manifest"),
    "no weights": (remove("policy/model.safetensors"), "model.safetensors"),
    "weights cut short": (cut("policy/model.safetensors"), "model.safetensors"),
    "a changed byte": (flip("policy/*.safetensors"), "safetensors"),
    "no policy": (remove("policy"), "policy"),
}


def checkpoint_cases() -> Iterator[Case]:
    """Yield damaged checkpoints: exported, trained from, resumed from and averaged."""
    export = ("tools/convert_to_hf.py", "--checkpoint", "{tmp}/checkpoint", "--out", "{tmp}/out")
    average = ("tools/average_checkpoints.py", "{tmp}/checkpoint", "{checkpoint}", "--out", "{tmp}/out")
    start = tuple(word.replace("{model}", "{tmp}/checkpoint") for word in COLD_START)
    for name, (edit, says) in CHECKPOINTS.items():
        for verb, command in (("export", export), ("average", average), ("train", start)):
            if verb == "average" and "manifest" in name and "no" == name.split()[0]:
                continue  # without a manifest it is a folder of another kind
            yield Case("checkpoints", f"{verb}: {name}", command, says, edits=(copied("checkpoint", edit),))

        def resumable(folder: Path, sound: dict[str, Path], edit: Edit = edit) -> None:
            target = folder / "run/checkpoints/step_000001"
            shutil.copytree(sound["checkpoint"], target)
            edit(target)

        yield Case("checkpoints", f"resume: {name}", COLD_START, "step_000001", edits=(resumable,))
    yield Case("checkpoints", "export: a critic that is not there", (*export_of_sound(), "--critic"), "critic")
    yield Case("checkpoints", "export: onto what is not ours", onto("{tmp}"), "exists", {"mine.txt": "x"})
    command = ("tools/average_checkpoints.py", "{checkpoint}", "--out", "{tmp}/out", "{tmp}/absent")
    yield Case("checkpoints", "average: one that is not there", command, "absent")


def export_of_sound() -> tuple[str, ...]:
    """Return the command that exports the sound checkpoint."""
    return ("tools/convert_to_hf.py", "--checkpoint", "{checkpoint}", "--out", "{tmp}/out")


def onto(folder: str) -> tuple[str, ...]:
    """Return the command that exports the sound checkpoint onto a folder."""
    return ("tools/convert_to_hf.py", "--checkpoint", "{checkpoint}", "--out", folder)


SETS: dict[str, tuple[Edit, str]] = {
    "no manifest": (remove("manifest.json"), "manifest"),
    "a manifest that is no JSON": (write("manifest.json", "{"), "manifest"),
    "a manifest of nothing": (write("manifest.json", "{}"), "manifest"),
    "tokens cut short": (cut("*tokens*"), "tokens"),
    "no tokens": (remove("*tokens*"), "tokens"),
    "not a set": (remove("*"), "manifest"),
}


def set_cases() -> Iterator[Case]:
    """Yield damaged tokenised sets, trained on and verified."""
    for name, (edit, says) in SETS.items():
        yield Case("tokenised sets", f"train: {name}", SET, says, edits=(copied("set", edit),))
        verify = ("tools/tokenise.py", "{tmp}/set", "--verify")
        yield Case("tokenised sets", f"verify: {name}", verify, says, edits=(copied("set", edit),))
    verify = ("tools/tokenise.py", "{tmp}/set", "--verify")
    yield Case("tokenised sets", "verify: a changed byte", verify, "token", edits=(copied("set", flip("*tokens*")),))
    absent = (*SET[:-1], "data.tokenised={tmp}/absent")
    yield Case("tokenised sets", "train: a set that is not there", absent, "absent")


GRADED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "JSON"),
    "a list": ("[]", "object"),
    "no response": ('{"answer": "2"}', "response"),
    "a response that is a number": ('{"response": 2, "answer": "2"}', "response"),
    "no answer": ('{"response": "2"}', "answer"),
    "an answer that is a list": ('{"response": "2", "answer": [2]}', "answer"),
    "options that are a text": ('{"response": "2", "answer": "A", "options": "AB"}', "options"),
    "a verdict that is a text": ('{"response": "2", "answer": "2", "correct": "yes"}', "correct"),
    "no rows": ("\n \n", "no rows"),
}

GRADE = ("tools/grade.py", "{tmp}/rows.jsonl")
TOOLS: dict[str, tuple[tuple[str, ...], str]] = {
    "grade: a file that is not there": (GRADE, "rows.jsonl"),
    "grade: no workers": (("tools/grade.py", "{rows}", "--workers", "0"), "workers"),
    "grade: no time": (("tools/grade.py", "{rows}", "--timeout-s", "0"), "timeout"),
    "grade: a time that is none": (("tools/grade.py", "{rows}", "--timeout-s", "nan"), "timeout"),
    "plan: an unknown recipe": (("tools/plan.py", "rl_9b"), "rl_9b"),
    "plan: an unknown key": (("tools/plan.py", "rl_7b_64gpu", "model.path=7B", "run.sed=1"), "sed"),
    "plan: an unknown GPU": (("tools/plan.py", "rl_7b_64gpu", "model.path=7B", "--gpu", "h300"), "h300"),
    "plan: no processes": (("tools/plan.py", "rl_7b_64gpu", "model.path=7B", "--world", "-8"), "world"),
    "plan: a world that does not divide": (("tools/plan.py", "rl_7b_64gpu", "model.path=7B", "--world", "9"), "9"),
    "plan: an MFU above 1": (("tools/plan.py", "rl_7b_64gpu", "model.path=7B", "--mfu", "4"), "mfu"),
    "plan: an MFU of 0": (("tools/plan.py", "rl_7b_64gpu", "model.path=7B", "--mfu", "0"), "mfu"),
    "plan: an unknown model": (("tools/plan.py", "rl_7b_64gpu", "model.path=9B"), "9B"),
    "plan: a recipe that is no YAML": (("tools/plan.py", "{rows}.yaml"), "yaml"),
    "tokenise: no model": (("tools/tokenise.py", "{tmp}/set", "data.sources=[{path: {rows}}]"), "--model"),
    "tokenise: another setting": (("tools/tokenise.py", "{tmp}/set", "--model", "{model}", "run.dir=x"), "run.dir"),
    "tokenise: an unknown setting": (("tools/tokenise.py", "{tmp}/s", "--model", "{model}", "data.pat=x"), "pat"),
    "tokenise: no workers": (
        ("tools/tokenise.py", "{tmp}/set", "--model", "{model}", "--workers", "0", "data.sources=[{path: {rows}}]"),
        "workers",
    ),
    "tokenise: onto a file": (
        ("tools/tokenise.py", "{rows}", "--model", "{model}", "data.sources=[{path: {rows}}]"),
        "rows",
    ),
    "report: a folder that is not there": (("tools/report.py", "{tmp}/absent"), "absent"),
    "report: a folder without a run": (("tools/report.py", "{tmp}"), "run"),
    "report: a file": (("tools/report.py", "{rows}"), "rows"),
    "report: a negative wait": (("tools/report.py", "{tmp}", "--every", "-1"), "every"),
    "replay: a run that is not there": (("tools/replay.py", "{tmp}/absent", "0"), "absent"),
    "replay: a negative iteration": (("tools/replay.py", "{tmp}", "-1"), ""),
    "verify: a folder that is not there": (("tools/verify.py", "--hf", "{tmp}/absent"), "absent"),
    "verify: an unknown layout": (("tools/verify.py", "--hf", "{model}", "--layout", "xp=2"), "xp"),
    "verify: a layout of text": (("tools/verify.py", "--hf", "{model}", "--layout", "tp=two"), "tp"),
    "verify: a layout that does not divide": (("tools/verify.py", "--hf", "{model}", "--layout", "tp=3"), "tp=3"),
    "verify: a checkpoint that is not there": (
        ("tools/verify.py", "--hf", "{model}", "--checkpoint", "{tmp}/absent"),
        "absent",
    ),
    "import: no workers": (
        ("tools/convert_from_hf.py", "--hf", "{model}", "--out", "{tmp}/o", "--workers", "0"),
        "workers",
    ),
    "import: YaRN by nothing": (
        ("tools/convert_from_hf.py", "--hf", "{model}", "--out", "{tmp}/o", "--yarn", "0"),
        "yarn",
    ),
    "import: YaRN by nan": (
        ("tools/convert_from_hf.py", "--hf", "{model}", "--out", "{tmp}/o", "--yarn", "nan"),
        "yarn",
    ),
    "import: onto the model": (("tools/convert_from_hf.py", "--hf", "{model}", "--out", "{model}", "--force"), "model"),
    "tiny model: heads that do not divide": (("tools/make_tiny_model.py", "--out", "{tmp}/m", "--heads", "3"), "heads"),
    "tiny model: no layers": (("tools/make_tiny_model.py", "--out", "{tmp}/m", "--layers", "0"), "layers"),
    "tiny model: a deviation that is none": (("tools/make_tiny_model.py", "--out", "{tmp}/m", "--std", "nan"), "std"),
    "tiny model: a corpus that is not there": (
        ("tools/make_tiny_model.py", "--out", "{tmp}/m", "--corpus", "{tmp}/absent"),
        "absent",
    ),
    "tiny model: onto what is not ours": (("tools/make_tiny_model.py", "--out", "{tmp}"), "exists"),
    "evaluate: no sets": (("tools/evaluate.py", "--model", "{model}", "--out", "{tmp}/out"), "--data"),
    "evaluate: a set that is not there": (
        ("tools/evaluate.py", "--model", "{model}", "--out", "{tmp}/out", "--data", "a={tmp}/absent.jsonl"),
        "absent",
    ),
    "evaluate: a model that is not there": (
        ("tools/evaluate.py", "--model", "{tmp}/absent", "--out", "{tmp}/out", "--data", "a={rows}"),
        "absent",
    ),
    "evaluate: a negative limit": (
        ("tools/evaluate.py", "--model", "{model}", "--out", "{tmp}/out", "--data", "a={rows}", "--limit", "-1"),
        "limit",
    ),
    "evaluate: a temperature that is none": (
        ("tools/evaluate.py", "--model", "{model}", "--out", "{tmp}/o", "--data", "a={rows}", "--temperature", "nan"),
        "temperature",
    ),
    "evaluate: a set twice": (
        ("tools/evaluate.py", "--model", "{model}", "--out", "{tmp}/o", "--data", "a={rows}", "--data", "a={rows}"),
        "a",
    ),
    "evaluate: supervised rows without an answer": (
        ("tools/evaluate.py", "--model", "{model}", "--out", "{tmp}/o", "--data", "a={rows}", "--metric", "boxed"),
        "answer",
    ),
    "judge: scores that are not there": (("tools/judge.py", "{tmp}/a.json", "--judge", "vllm:{model}"), "a.json"),
    "judge: an unknown judge": (("tools/judge.py", "{rows}", "--judge", "wise"), "judge"),
    "behaviours: a file without a name": (("tools/behaviours.py", "{rows}", "--out", "{tmp}/out"), "NAME=FILE"),
    "behaviours: a file that is not there": (("tools/behaviours.py", "a={tmp}/absent", "--out", "{tmp}/out"), "absent"),
}


def cases() -> Iterator[Case]:
    """Yield every case of this file."""
    yield from model_cases()
    yield from checkpoint_cases()
    yield from set_cases()
    for name, (row, says) in GRADED.items():
        yield Case("rewards", f"grade: {name}", GRADE, says, {"rows.jsonl": row + "\n"})
    for name, (command, says) in TOOLS.items():
        yield Case("tools", name, command, says, {"mine.txt": "x"})
    for answer in ("all", "none"):
        yield rule_case(answer)


def rule_case(name: str) -> Case:
    """Return a run whose reward function fails for every response."""
    body = {
        "all": "def reward(response, answer, options):\n    raise RuntimeError('no')\n",
        "none": "def reward(response, answer, options):\n    return float('nan')\n",
    }[name]
    row = {"messages": [TEXT_ROW["messages"][0]], "answer": "2", "source": "s", "note": THOUGHT[:0]}
    del row["note"]
    command = (*RL, "data.sources=[{path: {tmp}/rows.jsonl, name: s}]", "reward.rules={s: 'failing:reward'}")
    files: dict[str, str | bytes] = {"rows.jsonl": json.dumps(row) + "\n", "failing.py": body}
    return Case("rewards", f"rl: a function that fails ({name})", command, "failing", files)
