"""The Triton kernels: their arithmetic, interpreted on the CPU, and that they become code for a Hopper GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ovr_megatron.model import kernels

CUOBJDUMP = Path(triton.backends.__file__).with_name("nvidia") / "bin/cuobjdump"
# By the first letter of a parameter's type as it is written below.
TYPES = {"x": None, "i": "i32", "f": "fp32", "l": "*i64", "b": "*u8", "s": "*fp32"}
# Of each kernel: x (tensors in the model's dtype), i (a size), f (a factor), l, b (labels, banned), s (float32: logits,
# statistics).
SIGNATURES = {
    "_swiglu": "xxi",
    "_swiglu_backward": "xxi",
    "_rotate": "xsxiiii",
    "_add_tile": "sblssssif",
    "_tile_gradient": "sblssssxif",
}
CONSTANTS: dict[str, list[dict[str, int | bool]]] = {
    "_swiglu": [{"BLOCK": 1024}],
    "_swiglu_backward": [{"BLOCK": 1024}],
    "_rotate": [{"SIGN": -1, "HEADS": n, "HALF": 64} for n in (4, 16, 32)],
    "_add_tile": [{"BLOCK": 2048}],
    "_tile_gradient": [{"HAS_ENTROPY": entropy, "BLOCK": 1024} for entropy in (False, True)],
}


def test_arithmetic() -> None:
    file = Path(__file__).with_name("kernel_arithmetic.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("number", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_becomes_code_for_a_hopper_gpu(tmp_path: Path, name: str, number: str) -> None:
    kernel = getattr(kernels, name)
    kinds = [f"*{number}" if kind == "x" else TYPES[kind] for kind in SIGNATURES[name]]
    for constants in CONSTANTS[name]:
        signature = dict(zip(kernel.arg_names, [*kinds, *["constexpr"] * len(constants)], strict=True))
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        warps = 8 if name == "_add_tile" else 4
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "-res-usage", str(tmp_path / "kernel.cubin")]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "sm_90" in compiled.asm["ptx"]
        assert " STACK:0 " in usage and " LOCAL:0 " in usage, usage  # no register was spilled
