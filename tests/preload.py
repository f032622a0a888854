"""Import what a rank imports until it trains: the forks of this process then have it.

An import of the stages does not bring all of it.  Transformers imports every video processor that it knows when it
loads the first one, and vLLM its worker and its quantisations when an engine starts; both take a core three seconds.
"""

import contextlib
import importlib
import tempfile
from pathlib import Path

import ovr_megatron.coldstart.training
import ovr_megatron.curation.prepare
import ovr_megatron.data_checks
import ovr_megatron.launch
import ovr_megatron.plan.report
import ovr_megatron.rl.training
import ovr_megatron.verify  # noqa: F401
from ovr_megatron.data.hf_assets import load_assets
from ovr_megatron.families import ModelShape, default_family
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime.distributed import keep_generators

# By their names, since another version of vLLM may lack one.
OF_AN_ENGINE = (
    "vllm.entrypoints.launchers.cli_args",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.gpu_worker",
)

for name in OF_AN_ENGINE:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
default_family().load_rollout_class()
with keep_generators(), tempfile.TemporaryDirectory() as folder:
    model = make_tiny_model(Path(folder) / "model")
    load_assets(model, ModelShape.from_hf(model))
