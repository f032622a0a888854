"""Evaluate a Hugging Face folder, or a checkpoint, with vLLM on problem sets.

Each set is asked once greedily and, with --samples K, K times more for avg@k, pass@k and maj@k.  DIR/SET.json holds the
scores with 95 % intervals, overall and by source, DIR/SET.responses.jsonl every response.  Under torchrun the
processes share the problems.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ovr_megatron.config import (
    ConfigError,
    DataConfig,
    EvaluationSettings,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SourceConfig,
)
from ovr_megatron.evaluation.benchmarks import format_benchmarks
from ovr_megatron.evaluation.scoring import EvaluationResult, format_accuracy
from ovr_megatron.families import LONGEST_RESPONSE, ModelShape
from ovr_megatron.launch import parse_options
from ovr_megatron.runtime.command import run_command, whole_number
from ovr_megatron.runtime.options import add_option, read_options
from ovr_megatron.runtime.terminal import printable

_NAMED_SOURCE = re.compile(r"([\w.-]+)=(.+)")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="ovr evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder, or a checkpoint (its policy)")
    data_help = (
        "JSONL, JSON or parquet file, folder, hub name, puzzle:KIND?split=heldout, or a benchmark of --list, which may"
        " also be the NAME of a copy; repeat for several sets"
    )
    add("--data", action="append", required=True, metavar="[NAME=]SRC", help=data_help)
    add("--list", action=_List, nargs=0, help="show the benchmarks, and what runs and scores them")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    evaluation = partial(add_option, parser, EvaluationSettings)
    data = partial(add_option, parser, DataConfig)
    rollout = partial(add_option, parser, RolloutConfig)
    samples_help = (
        "sampled responses for avg@k, pass@k and maj@k (default: greedy only, or as many as the benchmark asks for)"
    )
    evaluation("samples", metavar="K", help=samples_help)
    evaluation("temperature", default=None, metavar="T", help="of the samples (default: 1)")
    model_sampling_help = "without --temperature that of the folder's generation_config.json, if it has one and samples"
    add("--model-sampling", action="store_true", help=model_sampling_help)
    evaluation("limit", metavar="N", help="first N problems of each set (default: all)")
    max_tokens_help = (
        f"longest response (default: what the model's length leaves beside a prompt, at most {LONGEST_RESPONSE})"
    )
    evaluation("max_tokens", metavar="N", help=max_tokens_help)
    prompt_help = "longest prompt (default: what the model leaves, 8192)"
    add("--max-prompt-tokens", type=whole_number(0), metavar="N", help=prompt_help)  # 0, too, is the default
    metric_help = (
        "boxed: the last \\boxed{} is right; exact: the whole response is the reference text; auto: by row; or a rule"
        " of rewards, as box:0.5"
    )
    evaluation("metric", help=metric_help)
    data("template", default="model", help="chat template: the folder's own, or ours")
    data("min_pixels", default=None, metavar="N", help="image budget (default: the folder's)")
    data("max_pixels", default=None, metavar="N", help="image budget (default: the folder's)")
    data("max_images", metavar="N", help="images of one prompt (default: 8)")
    add_option(parser, ModelConfig, "dtype", default=None, help="dtype (default: the folder's)")
    rollout("tp", metavar="N", help="processes that hold one copy of the model (default: 1)")
    rollout("max_num_seqs", metavar="N", help="responses at a time (default: 256)")
    add_option(parser, RunConfig, "threads", metavar="N", help="CPU threads (default: torch's choice)")
    evaluation("seed", metavar="N", help="seed of the samples (default: 1)")
    return parser


class _List(argparse.Action):
    """Print the benchmarks and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(format_benchmarks())
        parser.exit()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and evaluate."""
    args = parse_options(build_parser(), argv)

    # Here, so that --help does not wait for vLLM.
    from ovr_megatron.checkpoint.store import weights_of
    from ovr_megatron.data.hf_assets import check_assets
    from ovr_megatron.evaluation.evaluator import evaluate_sets
    from ovr_megatron.runtime import distributed
    from ovr_megatron.runtime.lock import lock_folder
    from ovr_megatron.runtime.run_folder import run_folder_of
    from ovr_megatron.weights.folder import WeightFolder
    from ovr_megatron.weights.transfer import check_finite, check_weights

    # Every check comes before vLLM starts, which takes minutes.
    sources = [SourceConfig(path=path, name=name) for name, path in parse_sets(args.data).items()]
    model = weights_of(args.model)
    data = data_config(model, args)
    temperature = sampling_temperature(model, args)
    settings = read_options(
        EvaluationSettings, args, sources=sources, max_tokens=response_limit(model, args), temperature=temperature
    )
    rollout = RolloutConfig(tp=args.tp, max_num_seqs=args.max_num_seqs, gpu_memory_utilization=0.85)
    check_assets(model)
    world = distributed.start(ParallelConfig(tp=args.tp), args.seed, args.threads)
    lock_folder(run_folder_of(args.out), world.is_main)
    with WeightFolder(model) as folder:
        check_weights(folder, ModelShape.from_hf(model))
        # Every byte is read, so each rank takes its share of the tensors.
        check_finite(folder, (world.rank, world.size))
    dtype = args.dtype or dtype_of(model)
    for result in evaluate_sets(model, settings, data, rollout, dtype, args.out):
        print(printable(result_line(result, args.out)), flush=True)
    distributed.finish()


def script() -> None:
    """Run the command ``ovr-evaluate``."""
    run_command(main)


def parse_sets(sources: Sequence[str]) -> dict[str, str]:
    """Parse ``NAME=SRC`` or ``SRC`` arguments to paths by name; without ``NAME`` the source's own letters name it.

    Raises:
        ConfigError: two sets have one name.
    """
    sets: dict[str, str] = {}
    for source in sources:
        match = _NAMED_SOURCE.fullmatch(source)
        name, path = match.groups() if match else (_name_of(source), source)
        if name in sets:
            raise ConfigError(f"--data: two problem sets are called {name}; name one of them: OTHER={path}")
        sets[name] = path
    return sets


def _name_of(source: str) -> str:
    stem = source.removeprefix("puzzle:") if source.startswith("puzzle:") else Path(source).stem
    return re.sub(r"[^\w.-]+", "_", stem)


def data_config(model: Path, args: argparse.Namespace) -> DataConfig:
    """Return the data settings: arguments first, then the folder's image budget and the model's length limit.

    Raises:
        ConfigError: no tokens are left for a prompt, or prompt and response are longer than the model allows.
    """
    budget = image_budget(model)
    shape = ModelShape.from_hf(model)
    max_tokens = response_limit(model, args)
    max_prompt_tokens = shape.max_positions - max_tokens
    if max_prompt_tokens < 1:
        raise ConfigError(
            f"--max-tokens {max_tokens} leaves no room for a prompt: the model takes {shape.max_positions}"
        )
    if args.max_prompt_tokens:
        shape.check_length(args.max_prompt_tokens + max_tokens, "--max-prompt-tokens with --max-tokens")
    return DataConfig(
        template=args.template,
        min_pixels=args.min_pixels or budget["min_pixels"],
        max_pixels=args.max_pixels or budget["max_pixels"],
        max_images=args.max_images,
        max_prompt_tokens=args.max_prompt_tokens or min(max_prompt_tokens, DataConfig.max_prompt_tokens),
    )


def response_limit(model: Path, args: argparse.Namespace) -> int:
    """Return ``--max-tokens``, or what the model's length leaves beside the longest prompt.

    A model so short that a prompt of the default limit takes more than a quarter of it leaves three quarters.
    """
    shape = ModelShape.from_hf(model)
    # Not `data_config`, which needs this limit for the longest prompt.
    prompt_tokens = args.max_prompt_tokens or min(DataConfig.max_prompt_tokens, shape.max_positions // 4)
    return shape.response_limit(args.max_tokens or 0, prompt_tokens)


def sampling_temperature(model: Path, args: argparse.Namespace) -> float:
    """Return ``--temperature``, or with ``--model-sampling`` that of the folder's generation config, else the default.

    Raises:
        ConfigError: the folder's is no positive number.
    """
    file = model / "generation_config.json"
    if args.temperature is not None:
        return float(args.temperature)
    if not args.model_sampling or not file.is_file():
        return EvaluationSettings.temperature
    config = _read(file)
    value = config.get("temperature") if isinstance(config, dict) else None
    # A folder that does not sample has a temperature that nothing uses, and samples at 0 would all be the greedy one.
    if value is None or not config.get("do_sample") or value == 0:
        return EvaluationSettings.temperature
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 100:
        raise ConfigError(f"{file}: temperature is {value!r}; it must be a number up to 100")
    return float(value)


def image_budget(model: Path) -> dict[str, int]:
    """Return the folder's ``min_pixels`` and ``max_pixels``, or our defaults if its processor has none.

    Raises:
        ConfigError: a limit of the folder is no number of pixels.
    """
    file_config: Any = next((_read(model / name) for name in _PROCESSOR_FILES if (model / name).is_file()), {})
    # processor_config.json has the image processor's settings in a section of its own.
    image_config = file_config.get("image_processor", file_config) if isinstance(file_config, dict) else {}
    if not isinstance(image_config, dict):
        image_config = {}
    size: Any = image_config.get("size")
    if not isinstance(size, dict):
        size = {}
    # The edges of ``size`` are numbers of pixels as well, whatever their names say.
    low = image_config.get("min_pixels") or size.get("shortest_edge") or DataConfig.min_pixels
    high = image_config.get("max_pixels") or size.get("longest_edge") or DataConfig.max_pixels
    for pixels in (low, high):
        # True is an int of Python, and no number of pixels.
        if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 1:
            raise ConfigError(
                f"{model}: the image budget of its processor is {pixels!r}; it must be a number of pixels"
            )
    return {"min_pixels": low, "max_pixels": high}


def dtype_of(model: Path) -> str:
    """Return the dtype to run the folder's weights in: float32 if its config says so or nothing, else bfloat16."""
    config = _text_config(model)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return "float32" if dtype in (None, "float32") else "bfloat16"


def result_line(result: EvaluationResult, out: Path) -> str:
    """Return the scores of a set as one line for the terminal."""
    line = f"{result['set']}: {format_accuracy(result['greedy'])} of {result['problems']}"
    for title, score in result.get("official", {}).items():
        line += f", {title} {100 * score['accuracy']:.1f} %"
    if sampled := result["sampled"]:
        line += f", avg@{sampled['samples']} {100 * sampled['average']['accuracy']:.1f} %"
        for k, share in sampled["pass"].items():
            line += f", pass@{k} {100 * share['accuracy']:.1f} %"
    line += cut_off(result) + without_verdict(result)
    if result["dropped"]:
        line += f", {result['dropped']} prompts too long"
    speed = f"{result['tokens_per_second']:,.0f} tokens/s"
    return f"{line}; {speed}; {out / result['set']}.json"


def cut_off(result: EvaluationResult) -> str:
    """Return the shares of greedy and sampled responses that reached the limit of their length; or nothing."""
    shares = []
    for part, scores in (("greedy", result["greedy"]), ("sampled", result["sampled"])):
        stopped = scores["stopped"] if scores else None
        if stopped is not None and stopped < 1:
            shares.append(f"{100 * (1 - stopped):.1f} % of {part}")
    if not shares:
        return ""
    limit = result["settings"]["max_tokens"]
    return f"; cut off at {limit:,} tokens: {', '.join(shares)} responses, raise --max-tokens"


def without_verdict(result: EvaluationResult) -> str:
    """Return the numbers of responses without a verdict, which count as wrong; or nothing."""
    counts = []
    for part, scores in (("greedy", result["greedy"]), ("sampled", result["sampled"])):
        failed = scores.get("failed", 0) if scores else 0
        if failed:
            counts.append(f"{failed} {part}")
    if not counts:
        return ""
    return f"; no verdict on {', '.join(counts)} responses, counted as wrong: their graders failed"


def _text_config(model: Path) -> Mapping[str, object]:
    config = _read(model / "config.json")
    # Transformers 5 has the fields of the language model in a section of their own, 4 on the outer level.
    return {**config, **config.get("text_config", {})}


def _read(path: Path) -> Any:
    """Return the JSON value of a file of the folder, of whatever shape."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a whole Hugging Face folder") from error
