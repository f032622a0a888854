"""Print the reference of the Python interface as Markdown, from docstrings; docs/reference.md is this output."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ovr_megatron.config.reference import escaped

HEAD = """# Reference of the Python interface

Every name for programs, from its docstring; `ovr reference` prints this page. [The Python interface](api.md) shows them
in use.
"""
PACKAGE = Path(__file__).resolve().parents[1]
# Parts that load without Megatron and vLLM, beside those of `ovr_megatron.api`.
PARTS = {
    "plan_packs": "ovr_megatron.data.best_fit",
    "pack": "ovr_megatron.data.packing",
    "Pack": "ovr_megatron.data.packing",
    "rows": "ovr_megatron.weights.table",
    "TensorRow": "ovr_megatron.weights.table",
}
_FIELDS = ("Args", "Attributes", "Returns", "Raises")
Definition = ast.FunctionDef | ast.ClassDef


def main(argv: Sequence[str] | None = None) -> None:
    """Print the page."""
    argparse.ArgumentParser(prog="ovr reference", description=__doc__).parse_args(argv)
    print(reference_page(), end="")


def reference_page() -> str:
    """Return the page: a section for each name, read from the syntax tree, so that nothing heavy is imported."""
    # Imported here: its table comes with imports for type checkers, which a reader of imports follows to torch.
    from ovr_megatron.api import MODULES

    lines = [HEAD]
    for name, module in (MODULES | PARTS).items():
        place = f"from ovr_megatron import {name}" if name in MODULES else f"from {module} import {name}"
        definition = _find(module, name)
        # A class and a function may differ in capitals alone, which the links of a page do not tell apart.
        title = f"class {name}" if isinstance(definition, ast.ClassDef) else name
        lines += [f"## {title}", "", f"`{place}`", "", *_describe(definition, name)]
    return "\n".join(lines).rstrip() + "\n"


def _find(module: str, name: str) -> Definition:
    """Return the definition of ``name`` at the top level of ``module``."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = [node for node in tree.body if isinstance(node, Definition)]
    return next(node for node in definitions if node.name == name)


def _describe(node: Definition, title: str) -> Iterator[str]:
    """Yield the lines of a function, or of a class with its public methods."""
    if isinstance(node, ast.FunctionDef):
        yield from _signature(node, title)
        yield from _docstring(node)
        return
    methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
    constructor = next((method for method in methods if method.name == "__init__"), None)
    if constructor:
        yield from _signature(constructor, title)
    yield from _docstring(node)
    if constructor:
        yield from _docstring(constructor)
    for method in methods:
        if not method.name.startswith("_"):
            method_title = f"{title}.{method.name}"
            yield from (f"### {method_title}", "")
            yield from _signature(method, method_title)
            yield from _docstring(method)


def _signature(node: ast.FunctionDef, title: str) -> Iterator[str]:
    """Yield the call of a function with its types and defaults; that of a property is its type."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    is_property = any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)
    arguments = re.sub(r"^self(, )?", "", ast.unparse(node.args))
    call = title if is_property else f"{title}({arguments})"
    yield from ("```text", f"{call}{returns}", "```", "")


def _docstring(node: Definition) -> Iterator[str]:
    """Yield a docstring in the style of Google as Markdown: its text, then a list of each of its sections."""
    text = ast.get_docstring(node) or ""
    title = ""
    for block in re.split(r"^(Args|Attributes|Returns|Raises):\n", text, flags=re.MULTILINE):
        if block in _FIELDS:
            title = block
        elif title:
            yield from _entries(title, block)
        else:
            for paragraph in filter(None, block.split("\n\n")):
                yield from (_markdown(paragraph), "")


def _entries(title: str, block: str) -> Iterator[str]:
    """Yield a list of the entries of a section, a line each; the text of ``Returns`` has no names."""
    yield from (f"**{title}**", "")
    body = re.sub(r"^    ", "", block, flags=re.MULTILINE).strip()
    # A line that goes on is indented.
    for entry in re.split(r"\n(?=\S)", body) if title != "Returns" else [body]:
        name, colon, rest = entry.partition(": ")
        has_name = colon and title != "Returns"
        yield f"- `{name}`: {_markdown(rest)}" if has_name else f"- {_markdown(entry)}"
    yield ""


def _markdown(text: str) -> str:
    """Return the text of a docstring on one line, its names in single backticks."""
    return escaped(re.sub(r"\s+", " ", text.replace("``", "`")).strip())
