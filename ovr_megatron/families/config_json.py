"""``config.json`` of a model folder: read it, check what holds for every family, read fields within their bounds.

No torch, no Megatron.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ovr_megatron.errors import UserError
from ovr_megatron.runtime.folder_kinds import describe_folder

_DTYPES = ("float32", "bfloat16", "float16", "auto")
_EXCERPT = 80  # characters of a value that a message repeats

# Strict: Pydantic would otherwise take the text "8", the number 8.0 and true for integers.
Width = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
Depth = Annotated[int, Field(strict=True, ge=1, le=1000)]
Vocabulary = Annotated[int, Field(strict=True, ge=1, le=1 << 22)]
Positions = Annotated[int, Field(strict=True, ge=1, le=1 << 30)]
Index = Annotated[int, Field(strict=True, ge=0, le=1 << 22)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]


class ShapeError(UserError, ValueError):
    """A ``config.json`` that is not of a model we can build; names the file and the field."""


class Fields(BaseModel):
    """Fields of a part of ``config.json``; those that are not listed are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


Kind = TypeVar("Kind", bound=Fields)


def read_config(directory: str | Path, title: str) -> tuple[dict[str, object], Path]:
    """Return ``config.json`` of ``directory`` and its path.

    Args:
        directory: A Hugging Face folder.
        title: What the folder should hold, for messages.

    Raises:
        ShapeError: it cannot be read or is not JSON.
    """
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        remedy = f"give the folder of a Hugging Face {title} model"
        is_there = path.parent.exists()
        problem = f"{path} does not exist; {remedy}" if is_there else f"{directory}: there is no such folder; {remedy}"
        raise ShapeError(describe_folder(directory, "model") or problem) from None
    except json.JSONDecodeError as error:
        raise ShapeError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise ShapeError(f"{path} is not text in UTF-8; download or copy it again") from None
    # Python's JSON parser recurses for every bracket.
    except RecursionError:
        raise ShapeError(f"{path} is nested too deeply; download or copy it again") from None
    except OSError as error:
        raise ShapeError(f"{path} cannot be read ({error.strerror}); make it readable or copy it again") from None
    if not isinstance(raw, dict):
        raise ShapeError(f"{path}: holds a {type(raw).__name__} and not an object; download or copy it again")
    return raw, path


def check_kind(raw: dict[str, object], path: Path, architecture: str) -> None:
    """Refuse quantised weights, another head than that of ``architecture``, and a dtype that is no float.

    Raises:
        ShapeError: names the field and the remedy.
    """
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            method = part["quantization_config"]
            if isinstance(method, dict):
                method = method.get("quant_method", "unknown")
            raise ShapeError(
                f"{path}: field 'quantization_config' says that the weights are quantised ({method}); give the model "
                "that they were made from, in bfloat16 or float32"
            )
    architectures = raw.get("architectures") or [architecture]
    if not isinstance(architectures, list) or architecture not in architectures:
        raise ShapeError(f"{path}: field 'architectures' is {excerpt(architectures)}; it must name {architecture}")
    # Transformers has renamed torch_dtype to dtype; a folder may have either.
    for name in ("dtype", "torch_dtype"):
        dtype = raw.get(name)
        if dtype is not None and dtype not in _DTYPES:
            raise ShapeError(f"{path}: field {name!r} is {excerpt(dtype)}; it can be {', '.join(_DTYPES)}")


def read_fields(
    kind: type[Kind],
    values: object,
    path: Path,
    prefix: str = "",
) -> Kind:
    """Return the fields of one part of ``config.json``, each within its bounds.

    Args:
        kind: What to read.
        values: The part, as JSON gave it.
        path: The file, for messages.
        prefix: Where the part stands in the file, with a dot at its end.

    Raises:
        ShapeError: names the field, its value and what it can be.
    """
    if not isinstance(values, dict):
        raise ShapeError(f"{path}: field {prefix.rstrip('.')!r} is {excerpt(values)} and not an object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # Pydantic lists the errors of all fields; a message is about one.
        first = error.errors()[0]
        name = prefix + str(first["loc"][0])
        if first["type"] == "missing":
            raise ShapeError(f"{path}: field {name!r} is missing") from None
        message = first["msg"]
        # Pydantic begins a sentence where ours goes on.
        reason = message[:1].lower() + message[1:]
        raise ShapeError(f"{path}: field {name!r} is {excerpt(first['input'])}: {reason}") from None


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is a finite number of JSON."""
    # True is an int of Python; NaN and Infinity are numbers of its JSON parser.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def excerpt(value: object) -> str:
    """Return the value as a message shows it, cut off where it is long."""
    text = repr(value)
    if len(text) > _EXCERPT:
        text = text[:_EXCERPT] + "..."
    return text
