"""Evaluate a Hugging Face Qwen2.5-VL folder, or a checkpoint, with vLLM on problem sets.

Each set is asked once greedily and, with --samples K, K times more for avg@k, pass@k and maj@k.  DIR/SET.json holds the
scores with 95 % intervals, overall and by source, DIR/SET.responses.jsonl every response.  Under torchrun the
processes share the problems.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.config import ConfigError, DataConfig, ParallelConfig, RolloutConfig
from ovr_megatron.evaluation.benchmarks import table
from ovr_megatron.model.shape import LONGEST_RESPONSE, ModelShape
from ovr_megatron.runtime.command import number, run_command, whole_number
from ovr_megatron.runtime.terminal import printable

_NAMED = re.compile(r"([\w.-]+)=(.+)")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    this = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = this.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder, or a checkpoint (its policy)")
    what = (
        "JSONL, JSON or parquet file, folder, hub name, puzzle:KIND?split=heldout, or a benchmark of --list, which may"
    )
    what += " also be the NAME of a copy; repeat for several sets"
    add("--data", action="append", required=True, metavar="[NAME=]SRC", help=what)
    add("--list", action=_List, nargs=0, help="show the benchmarks, and what runs and scores them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    more = "sampled responses for avg@k, pass@k and maj@k (default: greedy only, or as many as the benchmark asks for)"
    add("--samples", type=whole_number(0), metavar="K", help=more)
    add("--temperature", type=number(least=0), default=1.0, metavar="T", help="of the samples (default: 1)")
    add("--limit", type=whole_number(0), default=0, metavar="N", help="first N problems of each set (default: all)")
    left = f"longest response (default: what the model's length leaves beside a prompt, at most {LONGEST_RESPONSE})"
    add("--max-tokens", type=whole_number(0), metavar="N", help=left)
    add(
        "--max-prompt-tokens",
        type=whole_number(0),
        metavar="N",
        help="longest prompt (default: what the model leaves, 8192)",
    )
    graded = "boxed: the last \\boxed{} is right; exact: the whole response is the reference text; auto: by row"
    add("--metric", choices=("auto", "boxed", "exact"), default="auto", help=graded)
    add("--template", choices=("model", "think"), default="model", help="chat template: the folder's own, or ours")
    add("--min-pixels", type=whole_number(0), metavar="N", help="image budget (default: the folder's)")
    add("--max-pixels", type=whole_number(0), metavar="N", help="image budget (default: the folder's)")
    add("--max-images", type=whole_number(0), default=8, metavar="N", help="images of one prompt (default: 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="number format (default: the folder's)")
    add(
        "--tp",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="processes that hold one copy of the model (default: 1)",
    )
    add("--max-num-seqs", type=whole_number(1), default=256, metavar="N", help="responses at a time (default: 256)")
    add("--threads", type=whole_number(0), default=0, metavar="N", help="CPU threads (default: torch's choice)")
    add("--seed", type=whole_number(0), default=1, metavar="N", help="seed of the samples (default: 1)")
    return this


class _List(argparse.Action):
    """Shows the benchmarks and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(table())
        parser.exit()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    args = parser().parse_args(argv)

    # Here, so that --help does not wait for vLLM.
    from ovr_megatron.checkpoint.store import weights_of
    from ovr_megatron.data.hf_assets import check_assets
    from ovr_megatron.evaluation.evaluator import run
    from ovr_megatron.evaluation.problems import Settings
    from ovr_megatron.runtime import distributed
    from ovr_megatron.runtime.lock import lock_folder
    from ovr_megatron.runtime.run_folder import run_folder_of
    from ovr_megatron.weights.folder import WeightFolder
    from ovr_megatron.weights.transfer import check_finite, check_weights

    sets, model = named(args.data), weights_of(args.model)
    data = data_config(model, args)
    names = ("samples", "temperature", "metric", "seed")
    settings = Settings(**{name: getattr(args, name) for name in names}, max_tokens=response_limit(model, args))
    rollout = RolloutConfig(tp=args.tp, max_num_seqs=args.max_num_seqs, gpu_memory_utilization=0.85)
    check_assets(model)
    world = distributed.start(ParallelConfig(tp=args.tp), args.seed, args.threads)
    lock_folder(run_folder_of(args.out), world.is_main)
    with WeightFolder(model) as folder:
        check_weights(folder, ModelShape.from_hf(model))
        check_finite(folder, (world.rank, world.size))
    for result in run(model, sets, args.limit, settings, data, rollout, args.dtype or dtype_of(model), args.out):
        print(printable(sentence(result, args.out)), flush=True)
    distributed.finish()


def script() -> None:
    """Entry point of ``ovr-evaluate``."""
    run_command(main)


def named(sources: Sequence[str]) -> dict[str, str]:
    """``NAME=SRC`` or ``SRC``, whose name is made of its own letters, to path by name.

    Raises:
        ConfigError: two sets of one name.
    """
    found: dict[str, str] = {}
    for source in sources:
        match = _NAMED.fullmatch(source)
        name, path = match.groups() if match else (_name(source), source)
        if name in found:
            raise ConfigError(f"--data: two problem sets are called {name}; name one of them: OTHER={path}")
        found[name] = path
    return found


def _name(source: str) -> str:
    stem = source.removeprefix("puzzle:") if source.startswith("puzzle:") else Path(source).stem
    return re.sub(r"[^\w.-]+", "_", stem)


def data_config(model: Path, args: argparse.Namespace) -> DataConfig:
    """Image budget of the folder and length limit of the model, where the command line does not say otherwise.

    Raises:
        ConfigError: no room is left for a prompt, or prompt and response are longer than the model allows.
    """
    budget = image_budget(model)
    shape = ModelShape.from_hf(model)
    positions = shape.max_positions
    longest = response_limit(model, args)
    limit = positions - longest
    if limit < 1:
        raise ConfigError(f"--max-tokens {longest} leaves no room for a prompt: the model takes {positions}")
    if args.max_prompt_tokens:
        shape.check_length(args.max_prompt_tokens + longest, "--max-prompt-tokens with --max-tokens")
    return DataConfig(
        template=args.template,
        min_pixels=args.min_pixels or budget["min_pixels"],
        max_pixels=args.max_pixels or budget["max_pixels"],
        max_images=args.max_images,
        max_prompt_tokens=args.max_prompt_tokens or min(limit, DataConfig.max_prompt_tokens),
    )


def response_limit(model: Path, args: argparse.Namespace) -> int:
    """Return ``--max-tokens``, or what the model's length leaves beside the longest prompt.

    A model so short that a prompt of the default limit takes more than a quarter of it leaves three quarters.
    """
    shape = ModelShape.from_hf(model)
    prompt_tokens = args.max_prompt_tokens or min(DataConfig.max_prompt_tokens, shape.max_positions // 4)
    return shape.response_limit(args.max_tokens or 0, prompt_tokens)


def image_budget(model: Path) -> dict[str, int]:
    """``min_pixels`` and ``max_pixels`` that the folder was exported with; our defaults if it does not say."""
    stated: Any = next((_read(model / name) for name in _PROCESSORS if (model / name).is_file()), {})
    stated = stated.get("image_processor", stated) if isinstance(stated, dict) else {}
    stated = stated if isinstance(stated, dict) else {}
    size = stated.get("size") if isinstance(stated.get("size"), dict) else {}
    low = stated.get("min_pixels") or size.get("shortest_edge") or DataConfig.min_pixels
    high = stated.get("max_pixels") or size.get("longest_edge") or DataConfig.max_pixels
    for pixels in (low, high):
        if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 1:
            raise ConfigError(
                f"{model}: the image budget of its processor is {pixels!r}; it must be a number of pixels"
            )
    return {"min_pixels": low, "max_pixels": high}


def dtype_of(model: Path) -> str:
    """Number format in which the folder's weights are meant to run: float32 if it says so, else bfloat16."""
    text = _text_config(model)
    named = text.get("dtype") or text.get("torch_dtype")
    return "float32" if named in (None, "float32") else "bfloat16"


def sentence(result: dict[str, Any], out: Path) -> str:
    """One line for the person at the terminal."""
    greedy, sampled = result["greedy"], result["sampled"]
    shown = f"{100 * greedy['accuracy']:.1f} % ({100 * greedy['low']:.1f} to {100 * greedy['high']:.1f})"
    passed = {k: share["accuracy"] for k, share in sampled["pass"].items()} if sampled else {}
    more = "".join(f", {title} {100 * each['accuracy']:.1f} %" for title, each in result.get("official", {}).items())
    more += f", avg@{sampled['samples']} {100 * sampled['average']['accuracy']:.1f} %" if sampled else ""
    more += "".join(f", pass@{k} {100 * value:.1f} %" for k, value in passed.items())
    more += cut_off(result) + without_verdict(result)
    dropped = f", {result['dropped']} prompts too long" if result["dropped"] else ""
    rate = f"{result['tokens_per_second']:,.0f} tokens/s"
    return f"{result['set']}: {shown} of {result['problems']}{more}{dropped}; {rate}; {out / result['set']}.json"


def cut_off(result: dict[str, Any]) -> str:
    """Return the share of answers that reached the limit of their length, of greedy and sampled ones; or nothing."""
    shares = [(part, result[part]["stopped"]) for part in ("greedy", "sampled") if result[part]]
    cut = [f"{100 * (1 - stopped):.1f} % of {part}" for part, stopped in shares if stopped is not None and stopped < 1]
    limit = result["settings"]["max_tokens"]
    return f"; cut off at {limit:,} tokens: {', '.join(cut)} responses, raise --max-tokens" if cut else ""


def without_verdict(result: dict[str, Any]) -> str:
    """Say on how many responses no grader came to a verdict, which count as wrong; nothing where there are none."""
    counts = [(part, result[part].get("failed", 0)) for part in ("greedy", "sampled") if result[part]]
    parts = ", ".join(f"{count} {part}" for part, count in counts if count)
    return f"; no verdict on {parts} responses, counted as wrong: their graders failed" if parts else ""


def _text_config(model: Path) -> dict[str, Any]:
    config = _read(model / "config.json")
    return {**config, **config.get("text_config", {})}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a whole Hugging Face folder") from error
