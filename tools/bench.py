"""Measure the project beside named rivals on this machine, in one run: ``ovr bench model [--json FILE]``.

gpu: on a GPU, every part of a day's work at the published sizes: step, vision, head and rl, one after the other.
model: forward and backward of our model beside Transformers', at layer shapes of the tiny, the 3B and the 7B model.
step: a cold-start pack of 65,536 tokens at the 3B and the 7B shape on a GPU, beside Transformers and beside the plan.
vision: the tower beside Transformers', and on two ranks, cut over them or with the images balanced over them.
prepare: data preparation beside a plain datasets.map.
head: log-probabilities over a large vocabulary in chunks, beside the whole logits.
packing: an epoch of natural lengths into packs of 65,536 tokens, beside NeMo's packing where `nemo` can be imported.
rl: one iteration's phases, generation beside plain vLLM, the weights' way into the engine beside a copy, verdicts.
save: how long a checkpoint holds two ranks up, beside all files by the first rank.
tail: how long two engines wait for the longest responses, also with rollout.oversample and rollout.max_staleness.
adapters: adapters merged into vLLM's weights beside vLLM's own LoRA path; a critic's memory beside a policy's.
peers: steps of supervised training and of GRPO beside TRL's trainers, on the same rows, whose losses have to agree.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

# The benchmarks belong to the checkout and are not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import LAYER_SHAPES, PARTS, PEER_SHAPES, STEP_SHAPES
from ovr_megatron.families import default_family, families
from ovr_megatron.launch import parse_options
from ovr_megatron.runtime.command import run_command, whole_number

GPU = ("step", "vision", "head", "rl")
PRESETS = ", ".join(STEP_SHAPES)
SHAPES = f"of {', '.join(LAYER_SHAPES)} (model), {PRESETS} (step, vision) or {', '.join(PEER_SHAPES)} (adapters, peers)"
SHAPES_OF = {"model": LAYER_SHAPES, "adapters": PEER_SHAPES, "peers": PEER_SHAPES}


def main() -> None:
    """Run a benchmark, print its table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gpu", *PARTS))
    parser.add_argument("--json", type=Path, help="write the rows to this file, too; after each part")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="turns that rivals take; the best counts")
    parser.add_argument("--parts", nargs="+", choices=GPU, default=GPU, help="some of them only (gpu)")
    parser.add_argument("--shapes", nargs="+", help=SHAPES)
    names = [family.name for family in families()]
    parser.add_argument("--family", choices=names, default=default_family().name, help="of tiny (model, vision)")
    parser.add_argument("--fp8", choices=("delayed", "current", "block"), default="current", help="scaling (step)")
    parser.add_argument("--trace", type=Path, help="folder for a trace of each of our steps (step)")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="rows with this word in their name (model, step, rl, peers)"
    )
    parser.add_argument("--peer", type=Path, default=Path("runs/peers"), help="folder that has TRL (peers)")
    parser.add_argument("--tokens", type=whole_number(1), default=1024, help="tokens of a pack (model)")
    parser.add_argument("--mean", type=whole_number(1), default=64, help="mean length of a document (model)")
    parser.add_argument(
        "--samples", type=whole_number(1), default=2_000_000, help="lengths of the whole epoch (packing)"
    )
    parser.add_argument(
        "--rival-samples", type=whole_number(1), default=10_000, help="lengths beside the rival (packing)"
    )
    parser.add_argument("--rows", type=whole_number(1), default=200_000, help="rows to prepare (prepare)")
    parser.add_argument("--workers", type=whole_number(1), default=1, help="processes that judge rows (prepare)")
    parser.add_argument("--iterations", type=whole_number(1), default=18, help="measured of each way (tail)")
    parser.add_argument("--prompts", type=whole_number(2), default=6, help="of an iteration (tail)")
    parser.add_argument("--oversample", type=float, default=0.5, help="as the setting rollout.oversample (tail)")
    parser.add_argument(
        "--staleness", type=whole_number(1), default=4, help="as the setting rollout.max_staleness (tail)"
    )
    parser.add_argument(
        "--between", type=float, default=0.5, help="share of the variance of lengths that a prompt decides (tail)"
    )
    parser.add_argument(
        "--step-ms", type=float, default=0.0, help="least milliseconds of an engine's step, as on a GPU (tail)"
    )
    arguments = parse_options(parser, None)
    unknown = set(arguments.shapes or ()) - set(SHAPES_OF.get(arguments.what, STEP_SHAPES))
    if unknown:
        parser.error(f"argument --shapes: {', '.join(sorted(unknown))}: no shape of {arguments.what}")

    # Imported here, so that --help does not wait for torch and the benchmarks.
    from benchmarks.parts import BENCHMARKS, gpu_name

    if arguments.what != "gpu":
        _write_json(arguments.json, BENCHMARKS[arguments.what](arguments))
        return
    results: dict[str, Any] = {"card": gpu_name(), "torch": metadata.version("torch")}
    print(f"{results['card']}, torch {results['torch']}")
    for part in arguments.parts:  # each in its own process, which leaves the GPU empty
        print(f"\n{part}", flush=True)
        results[part] = _run_in_subprocess(part)
        _write_json(arguments.json, results)


def _run_in_subprocess(part: str) -> Any:
    """Measure ``part`` with the options of this command; return its rows, or its exit status if it wrote none."""
    options = sys.argv[1:]
    options.remove("gpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        process = subprocess.run([sys.executable, __file__, part, *options, "--json", str(path)])
        return json.loads(path.read_text()) if path.exists() else {"failed": f"exit status {process.returncode}"}


def _write_json(path: Path | None, results: Any) -> None:
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
