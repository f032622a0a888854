"""Settings of the validation loss: rows that a supervised run measures and does not train on."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from pydantic import Field

from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.data import SourceConfig
from ovr_megatron.config.fields import Count, section


@section("validation.")
class ValidationConfig:
    """Rows whose loss is measured and not trained: sources of their own, or rows held out of the training data."""

    every: Annotated[Count, ZeroMeans("after the last step alone")] = 0
    """Steps between two validation losses; another is after the last step."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Sources of validation rows; none: rows are held out of the training data."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the rows of each training source that is held out.  The choice depends on a row's index alone."""
    rows: Annotated[Count, ZeroMeans("no bound")] = 0
    """Rows of each source for validation: held out of the training sources, or taken of validation.sources; with
    share, the most."""

    def __post_init__(self) -> None:
        require(
            not self.every or self.is_on,
            f"validation.every={self.every} has no rows: give validation.sources=[{{path: FILE}}], or validation.share "
            "or validation.rows of the training sources",
        )
        require(
            not (self.sources and self.share),
            f"validation.share={self.share} holds rows out of the training sources, and validation.sources are given; "
            "remove one of the two",
        )

    @property
    def is_on(self) -> bool:
        """Return whether there are rows for validation."""
        return bool(self.sources or self.share or self.rows)

    @property
    def holds_out(self) -> bool:
        """Return whether rows of the training data are held out."""
        return self.is_on and not self.sources
