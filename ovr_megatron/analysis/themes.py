"""Colours and sizes of the figures: light and dark, for a page and for a phone."""

from __future__ import annotations

from dataclasses import dataclass

WIDE = 6.4  # inches, for a page
NARROW = 3.9  # inches, for a phone


@dataclass(frozen=True)
class Theme:
    """Colours of one look; those of ``models`` in the order of `MODELS`."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    models: tuple[str, ...]

    @property
    def settings(self) -> dict[str, object]:
        """The theme as Matplotlib settings."""
        return {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "savefig.facecolor": self.paper,
            "text.color": self.ink,
            "axes.labelcolor": self.muted,
            "axes.edgecolor": self.grid,
            "xtick.color": self.grid,
            "ytick.color": self.grid,
            "xtick.labelcolor": self.muted,
            "ytick.labelcolor": self.muted,
            "grid.color": self.grid,
            "figure.constrained_layout.h_pad": 0.1,
            "figure.constrained_layout.w_pad": 0.1,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlepad": 10,
            "ytick.major.size": 0,
            "font.size": 9.5,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "lines.solid_capstyle": "round",
        }


LIGHT = Theme("light", "#ffffff", "#1d2127", "#626975", "#e4e2dc", ("#9aa0a8", "#3a7cbd", "#d9652b", "#8660b3"))
DARK = Theme("dark", "#1b1e24", "#e9e7e2", "#a2a8b3", "#333842", ("#868d98", "#69a6e3", "#f0905a", "#b596dd"))


def legend_columns(width: float) -> int:
    """Return how many entries of a legend stand beside each other in a figure of ``width`` inches."""
    return 4 if width == WIDE else 2
