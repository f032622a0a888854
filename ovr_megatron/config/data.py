"""Settings of the data: sources of rows, and how rows become tokens and packs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ovr_megatron.config.checks import choice, require

# Formats of training data, then of published benchmarks; ``auto`` detects the format from the rows of each file.
FORMATS = (
    *("auto", "messages", "orz", "verl", "llava", "alpaca", "query", "mathvision", "puzzlevqa"),
    *("math", "gpqa", "mmlu", "mmlu_pro", "mathvista", "mathverse", "dynamath", "wemath", "logicvista", "mmmu_pro"),
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of rows.

    ``path`` is a JSONL, JSON or parquet file, a folder, a Hugging Face data set name, or ``puzzle:KIND`` for a
    generated stream.  ``weight`` is its share of the mixture; in a tokenised set, how often an epoch has each row.
    ``image_root`` is the folder outside of which its rows may name no image (default: the folder of the file).
    """

    path: str
    weight: float = 1.0
    format: str = "auto"
    image_root: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        choice("data.sources[].format", self.format, FORMATS)
        require(self.weight > 0, f"data.sources[].weight={self.weight} of {self.path} must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources of rows, and how rows become tokens; trainer, engine and export share one image budget.

    Rows come from ``sources``, or for the cold start from ``tokenised``, a folder that ``tools/tokenise.py`` wrote.
    ``on_error``: a row that cannot be used stops the run (``stop``), or is skipped, counted and listed (``skip``).
    ``template``: ``think`` writes chats with our template, whose replies begin after an opened ``<think>``; ``model``
    takes the template of the model folder.  ``without_thought``: a reply to learn that never closes the opened thought
    is an error (``refuse``), gets an empty thought (``close``), or is learned as it is (``open``).
    ``learn``: all replies of a chat of several turns are learned (``all``), or the ``last`` one.
    ``after_video``: positions of a text after a video go on one past the largest position (``extent``, as in vLLM and
    Transformers 4) or after the larger side of the picture (``grid``, Transformers 5.3 and later); by default the rule
    that the model folder names, else ``extent``.  It is written into exported models.
    ``mean_tokens`` and ``expected_samples`` are the figures of `tools/plan.py` where there are no data to look at.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    tokenised: str | None = None
    on_error: str = "stop"
    template: str = "think"
    without_thought: str = "refuse"
    learn: str = "all"
    min_pixels: int = 3136
    max_pixels: int = 1003520
    max_images: int = 8
    max_frames: int = 16
    max_image_bytes: int = 50_000_000
    max_image_pixels: int = 100_000_000
    pack_tokens: int = 65536
    max_prompt_tokens: int = 8192
    exclude: str | None = None
    after_video: str | None = None
    mean_tokens: int = 0
    expected_samples: int = 0

    def __post_init__(self) -> None:
        choice("data.template", self.template, ("think", "model"))
        choice("data.without_thought", self.without_thought, ("refuse", "close", "open"))
        choice("data.learn", self.learn, ("all", "last"))
        choice("data.on_error", self.on_error, ("stop", "skip"))
        if self.after_video is not None:
            choice("data.after_video", self.after_video, ("grid", "extent"))
        require(
            not self.tokenised or not (self.sources or self.exclude),
            f"data.tokenised={self.tokenised} replaces data.sources and data.exclude; remove one or the other",
        )
        require(
            0 < self.min_pixels <= self.max_pixels,
            f"data.min_pixels={self.min_pixels} must be positive and at most data.max_pixels={self.max_pixels}",
        )
        for key in ("max_images", "max_frames", "pack_tokens", "max_prompt_tokens"):
            require(getattr(self, key) > 0, f"data.{key}={getattr(self, key)} must be positive")
