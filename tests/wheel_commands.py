"""The lines of a shell script, each in a process forked from this one: ``python tests/wheel_commands.py SCRIPT``.

The libraries are imported once, for all lines; ``ovr`` and ``python`` of a line are those of this interpreter.  Prints
a JSON object a line: words, exit code, seconds.  The first line that fails ends it.
"""

import importlib
import json
import os
import runpy
import shlex
import sys
import time
from pathlib import Path

# The package first: it lets torchvision be imported.
LIBRARIES = ("ovr_megatron", "torch", "megatron.core.distributed", "torch.utils.tensorboard", "vllm.entrypoints.llm")
LIBRARIES += ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",)


def run(words: list[str]) -> None:
    """Run the words of a command in this process."""
    if words[0] == "python":
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
        return
    from ovr_megatron.cli import script

    assert words[0] == "ovr", words
    sys.argv = words
    script()


def forked(words: list[str]) -> int:
    """Run the words in a child; return its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        run(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Import the libraries, then run the lines."""
    sys.path.insert(0, os.getcwd())  # PYTHONPATH=$PWD, the first line of the script
    os.environ["PYTHONPATH"] = os.getcwd()
    began = time.monotonic()
    for name in LIBRARIES:
        importlib.import_module(name)
    print(
        json.dumps({"package": sys.modules["ovr_megatron"].__file__, "imports_s": round(time.monotonic() - began, 1)}),
        flush=True,
    )
    for line in Path(sys.argv[1]).read_text().replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words[0] == "export":
            continue
        began = time.monotonic()
        code = forked(words)
        print(json.dumps({"words": words, "code": code, "seconds": round(time.monotonic() - began, 1)}), flush=True)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
