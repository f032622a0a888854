"""What every module must keep to and no linter reads; taken from the syntax trees, so that nothing has to be imported.

The order of rooms, swallowed exceptions, imports in functions and the like are rules of Ruff and import-linter, which
stand in pyproject.toml.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovr_megatron import api

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ovr_megatron"

PATCHED_LIBRARIES = ("torch", "torchvision", "megatron")
SETTINGS_OF_LIBRARIES = ("torch.backends",)
# vLLM replaces it; here the original is put back.
PUT_BACK = {(f"{PACKAGE}.runtime.distributed", "torch.set_num_threads")}
WITHOUT_TORCH = (
    f"{PACKAGE}.rewards.worker",
    f"{PACKAGE}.families",
    f"{PACKAGE}.families.qwen2_5_vl",
    f"{PACKAGE}.families.qwen3_vl",
    f"{PACKAGE}.config",
)
# Commands, which import what they do in `main`, after the command line has been judged.
COMMANDS = re.compile(rf"tools\.\w+|{PACKAGE}\.cli(\.\w+)?|.*\.(__main__|\w*command)")
HEAVY = (*PATCHED_LIBRARIES, "vllm", "transformers", "datasets", "matplotlib")
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "misc"}
# Participles and pronouns, which name no thing, and the largest share of them among the names of a room.
EMPTY_NAMES = set(
    "found told mine given at own everyone everything together chosen whole wanted kept left here there others other "
    "one several shown known asked each some many most least held named works thing besides apart beside".split()
)
EMPTY_SHARE = 0.005
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    function: str | None


@dataclass(frozen=True)
class Module:
    name: str
    file: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        parts = Path(self.file).parts
        return "family" if parts[:2] == (PACKAGE, "families") and len(parts) > 3 else room_of(self.name)


def room_of(name: str) -> str:
    """`ovr_megatron.data.packing` -> data, `tools.grade` -> tools, `ovr_megatron` -> the empty name."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == PACKAGE else first


def read_project(root: Path) -> dict[str, Module]:
    """All modules of the package, of benchmarks/ and of tools/, by dotted name."""
    files: dict[str, Path] = {}
    for folder in (PACKAGE, "benchmarks", "tools"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    modules = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(), path.name)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        imports = tuple(read_imports(tree, package, files))
        modules[name] = Module(name, str(path.relative_to(root)), tree, imports)
    return modules


def read_imports(tree: ast.Module, package: str, known: dict[str, Path]) -> Iterator[Import]:
    """Every import, at any depth; of a package `from` which a module is imported, that module."""
    for node, function in walk_functions(tree, None):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, function)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in known else base, node.lineno, function)
        elif isinstance(node, ast.Call) and is_import_module(node) and node.args:
            if isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, function)


def walk_functions(node: ast.AST, function: str | None) -> Iterator[tuple[ast.AST, str | None]]:
    """Every node below, with the name of the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        yield child, function
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from walk_functions(child, inner)


def is_import_module(node: ast.Call) -> bool:
    return ast.unparse(node.func).endswith("import_module")


def cycles(modules: dict[str, Module]) -> Iterator[str]:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[str]:
        if name in path:
            yield "import cycle: " + " -> ".join([*path[path.index(name) :], name])
        elif name not in done:
            for item in modules[name].imports:
                if item.target in modules and item.target != name:
                    yield from visit(item.target, [*path, name])
            done.add(name)

    for name in modules:
        yield from visit(name, [])


def computed_imports(modules: dict[str, Module]) -> Iterator[str]:
    """`import_module` of a fixed name, which the linters do not read; runtime/cpu.py patches what it imports so."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and is_import_module(node) and module.name != f"{PACKAGE}.runtime.cpu":
                if node.args and isinstance(node.args[0], ast.Constant):
                    yield f"{module.file}:{node.lineno}: write an import statement for {node.args[0].value}"


def names_of_libraries(tree: ast.Module) -> dict[str, str]:
    """Names bound to something of the patched libraries, with what they stand for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and is_import_module(node.value):
            source = ast.unparse(node.value.args[0]).strip("f'\"")
            names |= {target.id: source for target in node.targets if isinstance(target, ast.Name)}
    return {name: source for name, source in names.items() if source.partition(".")[0] in PATCHED_LIBRARIES}


def assigned_attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What is assigned, deleted or `setattr` with a dot in its name: (line, dotted name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            yield node.lineno, f"{ast.unparse(node.args[0])}.{ast.unparse(node.args[1])}"


def stray_patches(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.name == f"{PACKAGE}.runtime.cpu":
            continue
        names = names_of_libraries(module.tree)
        for line, target in assigned_attributes(module.tree):
            first, _, rest = target.partition(".")
            full = f"{names[first]}.{rest}" if first in names else ""
            if full and not full.startswith(SETTINGS_OF_LIBRARIES) and (module.name, full) not in PUT_BACK:
                yield f"{module.file}:{line}: {full} is patched; only runtime/cpu.py patches"


def reach(modules: dict[str, Module], start: str) -> dict[str, str]:
    """All that is imported with `start`, packages on the way included, each with the module that does it."""
    reached = {start: start}
    queue = [start]
    while queue:
        name = queue.pop()
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        imports = modules[name].imports if name in modules else ()
        targets = [item.target for item in imports if item.function is None]
        for target in parents + targets:
            if target not in reached:
                reached[target] = name
                queue.append(target)
    return reached


def torch_where_it_must_not_be(modules: dict[str, Module]) -> Iterator[str]:
    commands = [name for name in modules if COMMANDS.fullmatch(name)]
    for start in (*WITHOUT_TORCH, *commands):
        if start not in modules:
            yield f"{start} is missing"
        for target, source in reach(modules, start).items():
            if target.partition(".")[0] in HEAVY:
                yield f"{start} comes to import {target} through {source}"


def forbidden_code(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            if reason := why_forbidden(node):
                yield f"{module.file}:{getattr(node, 'lineno', 0)}: {reason}"


def why_forbidden(node: ast.AST) -> str | None:
    match node:
        case ast.keyword(arg="trust_remote_code") | ast.Constant(value="trust_remote_code"):
            return "trust_remote_code runs code of a model folder"
        case ast.keyword(arg="weights_only", value=value) if ast.unparse(value) != "True":
            return "weights_only must be True: a pickle runs code"
        case ast.ExceptHandler(type=None):
            return "a bare except says not what it expects"
    return None


def names_that_say_nothing(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if NAMES_THAT_SAY_NOTHING & set(module.name.split(".")):
            yield f"{module.file}: name it after what it does"


def empty_names(modules: dict[str, Module]) -> Iterator[str]:
    names: dict[str, list[tuple[str, str]]] = {}
    for module in modules.values():
        for node in ast.walk(module.tree):
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            if name not in ("", "self", "cls", "_"):
                names.setdefault(module.room, []).append((name, f"{module.file}:{node.lineno}"))
    for room, pairs in names.items():
        empty = [f"{place} {name}" for name, place in pairs if name in EMPTY_NAMES]
        if len(empty) > EMPTY_SHARE * len(pairs):
            yield f"{room}: {len(empty)} of {len(pairs)} names say nothing: {', '.join(empty)}"


def nested_comprehensions(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, COMPREHENSIONS) and node.lineno != node.end_lineno:
                inner = (child for part in ast.iter_child_nodes(node) for child in ast.walk(part))
                if len(node.generators) > 1 or any(isinstance(child, COMPREHENSIONS) for child in inner):
                    yield f"{module.file}:{node.lineno}: a comprehension within one; make it a loop or two named steps"


def classes_of_one_name(modules: dict[str, Module]) -> Iterator[str]:
    places: dict[str, list[str]] = {}
    for module in modules.values():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{module.file}:{node.lineno}")
    for name, lines in places.items():
        if len(lines) > 1:
            yield f"{name} is the name of several classes: {', '.join(lines)}"


Rule = Callable[[dict[str, Module]], Iterator[str]]
RULES: tuple[Rule, ...] = (
    cycles,
    computed_imports,
    stray_patches,
    torch_where_it_must_not_be,
    forbidden_code,
    names_that_say_nothing,
    empty_names,
    nested_comprehensions,
    classes_of_one_name,
)


@pytest.fixture(scope="module")
def project() -> dict[str, Module]:
    return read_project(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_project_keeps_the_rule(rule: Rule, project: dict[str, Module]) -> None:
    assert f"{PACKAGE}.runtime.cpu" in project
    assert list(rule(project)) == []


def defined_names(tree: ast.Module) -> set[str]:
    """Names that a module has at its top level, in branches and ``with`` blocks of it, too."""
    names: set[str] = set()
    for node, function in walk_functions(tree, None):
        if function is not None:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_what_is_imported_from_the_project_is_there(project: dict[str, Module]) -> None:
    files = {ROOT / module.file: module.tree for module in project.values()}
    files |= {path: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    names = {name: defined_names(module.tree) for name, module in project.items()}
    names[PACKAGE] |= set(api.MODULES)  # which the package gives when they are asked for
    missing = []
    for path, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    if node.module in names and alias.name not in names[node.module] and inner not in project:
                        missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module} has no {alias.name}")
                    elif node.module.startswith(f"{PACKAGE}.") and node.module not in names:
                        missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: there is no {node.module}")
        missing += [f"{path.relative_to(ROOT)}:{text}" for text in missing_attributes(tree, names, set(project))]
    assert missing == []


def missing_attributes(tree: ast.Module, names: dict[str, set[str]], known: set[str]) -> Iterator[str]:
    """What is asked of an imported module of the project, as ``module.name``, and is not in it."""
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
        if f"{node.module}.{alias.name}" in known
    }
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = imported.get(node.value.id)
            if module and node.value.id not in stored and not node.attr.startswith("__"):
                if node.attr not in names[module] and f"{module}.{node.attr}" not in known:
                    yield f"{node.lineno}: {module} has no {node.attr}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_imports_without_torch(name: str) -> None:
    heavy = "{'torch', 'torchvision', 'transformers', 'vllm', 'megatron'}"
    script = f"import sys, {name}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


# A small project that keeps every rule; each case below changes one of its files and names the complaint.
SOUND = {
    "ovr_megatron/__init__.py": "from ovr_megatron.runtime import cpu",
    "ovr_megatron/config.py": "import dataclasses",
    "ovr_megatron/runtime/__init__.py": "",
    "ovr_megatron/runtime/cpu.py": "def f():\n    import torch\n    torch.cuda.synchronize = print",
    "ovr_megatron/data/__init__.py": "",
    "ovr_megatron/families/__init__.py": "import json",
    "ovr_megatron/families/qwen2_5_vl/__init__.py": "def f():\n    from ovr_megatron.families.qwen2_5_vl import model",
    "ovr_megatron/families/qwen3_vl/__init__.py": "import json",
    "ovr_megatron/families/qwen2_5_vl/model.py": "from ovr_megatron.model import layers",
    "ovr_megatron/data/schema.py": "from ovr_megatron.families import ModelShape",
    "ovr_megatron/data/packing.py": "import torch\nfrom . import schema\nfrom ovr_megatron.config import X",
    "ovr_megatron/model/__init__.py": "",
    "ovr_megatron/model/layers.py": "import transformer_engine.pytorch as te",
    "ovr_megatron/rewards/__init__.py": "",
    "ovr_megatron/rewards/worker.py": "import math_verify",
    "ovr_megatron/rl.py": "import torch\ntorch.backends.cuda.matmul.allow_tf32 = False\n"
    "def main():\n    from ovr_megatron.data import packing\n"
    "def save(state):\n    try:\n        torch.load(state, weights_only=True).eval()\n"
    "    except BaseException:\n        print(1)\n        raise\n",
    "ovr_megatron/cli/__init__.py": "import importlib",
    "ovr_megatron/cli/plan.py": "def main():\n    from ovr_megatron.data import packing",
    "tools/grade.py": "def grade():\n    from ovr_megatron.rewards import worker",
}
VIOLATIONS = [
    (cycles, "ovr_megatron/data/schema.py", "from ovr_megatron.data.packing import X", "import cycle"),
    (cycles, "ovr_megatron/data/schema.py", "def f():\n    from . import packing", "data.schema -> "),
    (computed_imports, "ovr_megatron/rl.py", "importlib.import_module('transformer_engine')", "rl.py:1"),
    (stray_patches, "ovr_megatron/rl.py", "import torch\ntorch.cuda.synchronize = print", "torch.cuda.synchronize"),
    (stray_patches, "ovr_megatron/rl.py", "import torch.cuda as c\nsetattr(c, 'x', 1)", "torch.cuda"),
    (stray_patches, "ovr_megatron/rl.py", "from megatron.core import a as b\nb.x: int = 1", "megatron.core.a.x"),
    (stray_patches, "ovr_megatron/rl.py", "m = import_module(f'megatron.{x}')\nm.torch = 1", "megatron"),
    (stray_patches, "ovr_megatron/rl.py", "from torchvision import ops\ndel ops.nms", "torchvision.ops.nms"),
    (torch_where_it_must_not_be, "ovr_megatron/rewards/worker.py", "from torch import nn", "import torch through"),
    (torch_where_it_must_not_be, "ovr_megatron/rewards/__init__.py", "import ovr_megatron.data.packing", "packing"),
    (torch_where_it_must_not_be, "tools/grade.py", "import datasets", "import datasets through tools.grade"),
    (torch_where_it_must_not_be, "ovr_megatron/cli/plan.py", "import ovr_megatron.data.packing", "packing"),
    (torch_where_it_must_not_be, "ovr_megatron/families/__init__.py", "if 1:\n    import vllm", "import vllm"),
    (forbidden_code, "ovr_megatron/rl.py", "load(x, trust_remote_code=False)", "trust_remote_code"),
    (forbidden_code, "ovr_megatron/rl.py", "options = {'trust_remote_code': 1}", "trust_remote_code"),
    (forbidden_code, "tools/grade.py", "torch.load(x, weights_only=False)", "weights_only"),
    (forbidden_code, "ovr_megatron/rl.py", "try:\n    f()\nexcept:\n    raise", "bare except"),
    (names_that_say_nothing, "ovr_megatron/data/utils.py", "", "utils.py"),
    (empty_names, "ovr_megatron/model/layers.py", "found = 1\ndef f(mine): pass", "2 of 2 names say nothing"),
    (nested_comprehensions, "ovr_megatron/model/layers.py", "x = [\n a\n for b in c\n for a in b\n]", "layers.py:1"),
    (nested_comprehensions, "ovr_megatron/model/layers.py", "x = [[\n a for a in b] for b in c]", "layers.py:1"),
    (classes_of_one_name, "ovr_megatron/rl.py", "class A: pass\nclass A: pass", "A is the name of several classes"),
]


def write_project(root: Path, files: dict[str, str]) -> dict[str, Module]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return read_project(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sound_project_passes(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(write_project(tmp_path, SOUND))) == []


@pytest.mark.parametrize(("rule", "file", "text", "complaint"), VIOLATIONS)
def test_violation_is_found(rule: Rule, file: str, text: str, complaint: str, tmp_path: Path) -> None:
    found = list(rule(write_project(tmp_path, {**SOUND, file: text})))
    assert found
    assert complaint in found[0]
