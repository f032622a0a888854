"""Functions of Transformer Engine from its own source text, where it is: they run without its compiled part.

It is looked for where it is installed, and in the folder ``TRANSFORMER_ENGINE_SOURCE``, of an unpacked wheel
(``pip download --no-deps transformer_engine==2.20.2``) its ``transformer_engine``.
"""

import ast
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def source_functions(file: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The functions ``names`` of ``file``, methods as plain functions, and their globals; None without the source."""
    folder = os.environ.get("TRANSFORMER_ENGINE_SOURCE")
    spec = None if folder else importlib.util.find_spec("transformer_engine")
    if spec is not None and spec.origin:
        folder = str(Path(spec.origin).parent)
    if not folder:
        return None
    tree = ast.parse((Path(folder) / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(function.name for function in functions) == sorted(names), f"{file} has no longer all of {names}"
    for function in functions:
        function.decorator_list.clear()
    scope: dict[str, Any] = {"torch": torch, "math": math}
    annotations = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*annotations, *functions], []), file, "exec"), scope)
    return scope
