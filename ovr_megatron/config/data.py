"""Settings of the data: sources of rows, and how rows become tokens and packs."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.fields import Count, LargeCount, NonNegativeFloat, PositiveInt, section

# ``auto`` detects the format from the rows of each file.  `ovr_megatron.data.formats.register_format` adds names.
FORMATS = ["auto", "messages", "orz", "verl", "llava", "alpaca", "query", "mathvision", "puzzlevqa"]
FORMATS += ["math", "gpqa", "mmlu", "mmlu_pro", "mmmu_pro"]
FORMATS += ["mathvista", "mathverse", "dynamath", "wemath", "logicvista"]


@section("data.sources[].")
class SourceConfig:
    """One source of rows."""

    path: str
    """JSONL, JSON or parquet file, a folder, a Hugging Face data set name, or puzzle:KIND for a generated stream."""
    weight: NonNegativeFloat = 1.0
    """Share of the mixture; in epochs (steps=0, or a tokenised set), how often one has each row."""
    format: str = "auto"
    """Format of the rows: one of docs/data.md, or package.module:NAME; auto detects it from the rows of each file."""
    image_root: str | None = None
    """Folder outside of which the rows may name no image; none: the folder of the file."""
    name: str | None = None
    """Name of the source in metrics and reports; none: its path."""
    streaming: bool = False
    """Read the rows from the beginning to the end without a copy on the disk, for training on a set that does not fit
    it."""
    shuffle_rows: PositiveInt = 1000
    """Rows of a streamed source that are read and shuffled together; each rank holds them in memory."""

    def __post_init__(self) -> None:
        require(
            self.format in FORMATS or ":" in self.format,
            f"data.sources[].format={self.format!r} is not known; choose one of {', '.join(FORMATS)}, or write "
            "package.module:NAME",
        )
        require(
            "://" not in (self.image_root or ""),
            f"data.sources[].image_root={self.image_root} is a URL; give a folder, or put the images into tar shards "
            "or parquet",
        )
        require(
            not (self.streaming and self.path.startswith("puzzle:")),
            f"data.sources[].streaming of {self.path}: a puzzle is generated; leave streaming out",
        )
        # Here, not in the type: the message names the source.
        require(self.weight > 0, f"data.sources[].weight={self.weight} of {self.path} must be positive")


@section("data.")
class DataConfig:
    """Sources of rows, and how rows become tokens; trainer, engine and export share one image budget."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Sources of rows."""
    tokenised: str | None = None
    """For ovr sft, in place of sources: a folder that ovr tokenise wrote."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a row that cannot be used stops the run, or is skipped, counted and listed."""
    template: Literal["think", "model"] = "think"
    """Chat template: ours, whose replies begin after an opened <think>, or that of the model folder."""
    without_thought: Literal["refuse", "close", "open"] = "refuse"
    """A reply to learn that never closes the opened thought is an error, gets an empty thought (close), or is learned
    as it is (open)."""
    learn: Literal["all", "last"] = "all"
    """Replies that are learned of a chat of several turns."""
    # Four merged patches of 28 x 28, as in the published models' own processor.
    min_pixels: Count = 3136
    """Pixels that an image, or in some model families (docs/models.md) all frames of a video together, has at least
    after resizing; a smaller one is enlarged."""
    # 1,280 merged patches, each a token; the published processor allows 16,384.
    max_pixels: Count = 1003520
    """Pixels that an image, or in some model families (docs/models.md) all frames of a video together, has at most
    after resizing."""
    max_images: PositiveInt = 8
    """Images of a row."""
    max_frames: PositiveInt = 16
    """Frames of a video."""
    # A small file can hold very many pixels, and a large one few: both are bounded.
    max_image_bytes: Count = 50_000_000
    """Bytes of an image file."""
    max_image_pixels: Count = 100_000_000
    """Pixels of an image file."""
    pack_tokens: PositiveInt = 65536
    """Tokens of a pack."""
    balance: Literal["attention", "flops"] = "attention"
    """Work of rows by which ovr sft shares a step's packs among replicas: the language model's attention, or all FLOP,
    those of the vision tower included; a tokenised set, which has no images, is shared by attention."""
    max_prompt_tokens: PositiveInt = 8192
    """Tokens of a prompt; longer ones are dropped and counted."""
    exclude: str | None = None
    """File with the fingerprints of rows that are left out."""
    after_video: Literal["grid", "extent"] | None = None
    """Where the positions of a text after a video go on: one past the largest position (extent, as in vLLM and
    Transformers 4), or after the larger side of the picture (grid, Transformers 5.3 and later); none: the rule that the
    model folder names, else extent.  It is written into exported models."""
    mean_tokens: Annotated[Count, ZeroMeans("from the data")] = 0
    """Mean tokens of a sample for ovr plan, where there are no data to look at."""
    expected_samples: Annotated[LargeCount, ZeroMeans("from the data")] = 0
    """Number of samples for ovr plan, where there are no data to look at."""

    def __post_init__(self) -> None:
        # A tokenised set was made of its sources, without the rows of its own exclude file.
        require(
            not self.tokenised or not (self.sources or self.exclude),
            f"data.tokenised={self.tokenised} replaces data.sources and data.exclude; remove one or the other",
        )
        require(
            0 < self.min_pixels <= self.max_pixels,
            f"data.min_pixels={self.min_pixels} must be positive and at most data.max_pixels={self.max_pixels}",
        )
