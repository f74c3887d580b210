"""What a run of the benchmarks says: figures against what is aimed at, as a table, as JSON and as plots."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .timing import Ratio


@dataclass
class Figure:
    """One line of the table; `is_least` where the aim is a lower bound."""

    name: str
    ratio: Ratio
    aim: float
    is_least: bool = True
    note: str = ""

    @property
    def is_reached(self) -> bool:
        return self.ratio.value >= self.aim if self.is_least else self.ratio.value <= self.aim

    def row(self) -> str:
        value, aim = f"{self.ratio.value:.3g} x", f"{'at least' if self.is_least else 'at most'} {self.aim:.3g}"
        if self.ratio.least != self.ratio.greatest:
            value += f" [{self.ratio.least:.3g}-{self.ratio.greatest:.3g}]"
        return f"| {self.name} | {value} | {aim} | {'yes' if self.is_reached else '**no**'} | {self.note} |"


@dataclass
class Point:
    """One point of a plot: what a contender does at a length."""

    plot: str
    contender: str
    tokens: int
    value: float
    share_of_limit: float | None = None


@dataclass
class Report:
    machine: dict = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def add(self, figures: Iterable[Figure] = (), points: Iterable[Point] = ()) -> None:
        """Adds and prints what was measured: a run that is broken off has said what it knew."""
        for figure in figures:
            self.figures.append(figure)
            print(figure.row(), flush=True)
        for point in points:
            self.points.append(point)
            share = "" if point.share_of_limit is None else f", {point.share_of_limit:.0%} of the machine's limit"
            print(f"  {point.plot}: {point.contender}, {point.tokens:,} tokens: {point.value:.4g}{share}", flush=True)

    def table(self) -> str:
        """As Markdown."""
        head = ["| figure | measured [rounds] | aim | reached | |", "|---|---|---|---|---|"]
        return "\n".join([*head, *(figure.row() for figure in self.figures)])

    def save(self, folder: Path) -> None:
        """Writes `results.json`, `table.md` and a PNG for each plot."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        (folder / "table.md").write_text(self.table() + "\n")
        for plot in dict.fromkeys(point.plot for point in self.points):
            draw(plot, [point for point in self.points if point.plot == plot], folder)


def draw(title: str, points: Sequence[Point], folder: Path) -> None:
    """A PNG named after the title, up to its first comma."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import LogLocator

    canvas = Canvas(figsize=(7, 4), layout="constrained")
    axes = canvas.subplots()
    for contender in dict.fromkeys(point.contender for point in points):
        own = sorted((point.tokens, point.value) for point in points if point.contender == contender)
        style = "-" if contender.startswith("Infini") else "--"
        axes.plot(*zip(*own), style, marker="o", markersize=4, label=contender)
    axes.set_xscale("log", base=2)
    values = [point.value for point in points]
    if max(values) > 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    lengths = sorted({point.tokens for point in points})
    axes.set_xticks(lengths, [f"{tokens // 1024:,}k" for tokens in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas.savefig(folder / f"{title.split(',')[0].replace(' ', '-')}.png", dpi=120)
