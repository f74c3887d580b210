"""What `python -m benchmarks.gpu` has measured, as Markdown tables and plots."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

from .report import Figure, Point, draw
from .suite import LINEAR, LLAMA, SLIDING
from .timing import Ratio, ratio


OURS = "Infini"
# Batch and tokens of the aim, and of what is nearest to it where Llama's cache does not fit.
LARGE_STEPS = ((64, 32_768), (64, 16_384), (32, 32_768))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def _outcome(outcome: dict, text: Callable[[dict], str]) -> str:
    if "error" in outcome:
        return "failed"
    if "left_out" in outcome:
        return outcome["left_out"]
    return text(outcome) if "seconds" in outcome else ""


def lines(cell: dict) -> str:
    """A cell as text, a line for each contender."""
    found = [f"    {name}: {value:.4g}" for name, value in cell.items() if name.endswith(("flops", "bandwidth"))]
    for title in ("contenders", "contenders_with_cache"):
        for name, outcome in cell.get(title, {}).items():
            text = _outcome(outcome, lambda of: milliseconds(median(of["seconds"])))
            if "peak_nbytes" in outcome:
                text += f", peak {outcome['peak_nbytes'] / 2**30:.2f} GiB"
            for share in ("share_of_matmul", "share_of_bandwidth"):
                if share in outcome:
                    text += f", {outcome[share]:.0%} {share.removeprefix('share_').replace('_', ' ')}"
            found.append(f"    {name}{' (with cache)' if 'cache' in title else ''}: {text}")
    for name, profile in cell.get("profiles", {}).items():
        text = _outcome(profile, lambda of: f"{milliseconds(of['seconds'])}, busy {milliseconds(of['busy_seconds'])}")
        found.append(f"    {name}: {text}")
    return "\n".join(found)


def _compared(cell: dict, theirs: str, ours: str, title: str = "contenders") -> Ratio | None:
    """Seconds of theirs by seconds of ours."""
    found = [cell.get(title, {}).get(name, {}).get("seconds") for name in (theirs, ours)]
    return ratio(*found) if all(found) else None  # type: ignore[arg-type]


def _of(cells: list[dict], part: str, size: str | None = None) -> list[dict]:
    found = [cell for cell in cells if cell["part"] == part and size in (None, cell["size"])]
    return sorted(found, key=lambda cell: (cell["size"], cell["batch"], cell["tokens"]))


def _ours(cell: dict) -> list[str]:
    """With the linear rule, by the kernels that sdpa chooses."""
    names = cell.get("contenders", {})
    return [name for name in names if name.startswith((LINEAR, SLIDING)) and "cuDNN" not in name]


def figures(cells: list[dict]) -> list[Figure]:
    """What is aimed at, with the 1.2 B shape."""
    found: list[tuple[str, Ratio | None, float, bool]] = []
    prefill = {(cell["tokens"], cell["batch"]): cell for cell in _of(cells, "prefill", "1.2b")}
    flash = {tokens: aim for tokens, aim in ((32_768, 2.0), (131_072, 6.0)) if (tokens, 1) in prefill}
    for tokens, aim in flash.items():
        for ours in _ours(prefill[tokens, 1]):
            title = f"prefill of {tokens:,} tokens against Llama with flash attention, {ours}"
            found.append((title, _compared(prefill[tokens, 1], LLAMA, ours), aim, True))
    for ours in _ours(prefill.get((32_768, 1), {})):
        share = prefill.get((32_768, 1), {}).get("contenders", {}).get(ours, {}).get("share_of_matmul")
        if share is not None:
            title = f"share of the measured matrix throughput in a prefill of 32,768 tokens, {ours}"
            found.append((title, Ratio(share, share, share), 0.55, True))
    for cell in _of(cells, "forward", "1.2b"):
        for title, how in (("contenders", "no cache"), ("contenders_with_cache", "with cache")):
            shape = f"{cell['tokens']:,} tokens, batch {cell['batch']}, {how}"
            found.append(
                (f"time of a forward of {shape}, by Llama's", _compared(cell, LINEAR, LLAMA, title), 1.05, False)
            )
    for cell in (*_of(cells, "decode", "1.2b"), *_of(cells, "graph", "1.2b")):
        if (cell["batch"], cell["tokens"]) not in LARGE_STEPS:
            continue
        by_bytes = f" (by the bytes read {cell['ratio_by_bytes']:.3g} x)" if "ratio_by_bytes" in cell else ""
        for cache in ("", ", preallocated cache", ", preallocated cache, CUDA graph"):
            ours = LINEAR + (", CUDA graph" if "graph" in cache else "")
            title = f"decode step after {cell['tokens']:,} tokens, batch {cell['batch']}, against {LLAMA}{cache}"
            found.append((title + by_bytes, _compared(cell, LLAMA + cache, ours), 4.0, True))
    for cell in _of(cells, "profile of decode", "1.2b"):
        profiles = cell.get("profiles", {})
        busy = [profiles.get(name, {}).get("busy_seconds") for name in (f"{LLAMA}, preallocated cache", LINEAR)]
        if (cell["batch"], cell["tokens"]) in LARGE_STEPS and all(busy):
            shape = f"after {cell['tokens']:,} tokens, batch {cell['batch']}"
            value = busy[0] / busy[1]
            title = f"time that a decode step {shape} keeps the GPU busy, against {LLAMA}, preallocated cache"
            found.append((title, Ratio(value, value, value), 4.0, True))
    for cell in _of(cells, "profile of prefill"):
        for name, profile in cell.get("profiles", {}).items():
            if name.startswith(OURS) and "memory_share" in profile:
                share = profile["memory_share"]
                title = f"share of the memory path in a prefill of {cell['tokens']:,} tokens, {cell['size']}, {name}"
                found.append((title, Ratio(share, share, share), 0.12, False))
    return [Figure(title, value, aim, is_least) for title, value, aim, is_least in found if value is not None]


def _pivot(cells: list[dict], text: Callable[[dict], str], title: str = "contenders") -> list[str]:
    """A line for each size, batch and number of tokens, a column for each contender."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.get(title, {})))
    head = ["size", "batch", "tokens", *names, "predicted"]
    has_predictions = any("predicted_seconds" in cell for cell in cells)
    rows = [f"| {' | '.join(head if has_predictions else head[:-1])} |"]
    rows.append("|---|" + "--:|" * (rows[0].count("|") - 2))
    for cell in cells:
        row = [cell["size"], str(cell["batch"]), f"{cell['tokens']:,}"]
        row += [_outcome(cell.get(title, {}).get(name, {}), text) for name in names]
        if has_predictions:
            predicted = cell.get("predicted_seconds", {})
            row.append(", ".join(f"{name}: {milliseconds(seconds)}" for name, seconds in predicted.items()))
        rows.append(f"| {' | '.join(row)} |")
    return rows


def _profile_rows(cells: list[dict]) -> list[str]:
    rows = ["| size | batch | what | model | time | GPU busy | kernels | where the time goes |"]
    rows.append("|---|--:|---|---|--:|--:|--:|---|")
    for cell in cells:
        for name, profile in cell.get("profiles", {}).items():
            if "groups" not in profile:
                rows.append(f"| {cell['size']} | {cell['batch']} | {cell['part']} | {name} | failed | | | |")
                continue
            busy = profile["busy_seconds"]
            groups = ", ".join(
                f"{group} {time / busy:.1%}" for group, time, _ in profile["groups"] if time > busy / 200
            )
            rows.append(
                f"| {cell['size']} | {cell['batch']} | {cell['part']} | {name} | {milliseconds(profile['seconds'])} "
                f"| {busy / profile['seconds']:.0%} | {profile['kernels']:,} | {groups} |"
            )
    return rows


def _seconds(outcome: dict) -> str:
    return milliseconds(median(outcome["seconds"]))


def _seconds_and_peak(outcome: dict) -> str:
    peak = f", {outcome['peak_nbytes'] / 2**30:.1f} GiB" if "peak_nbytes" in outcome else ""
    return _seconds(outcome) + peak


def _seconds_and_state(outcome: dict) -> str:
    return f"{_seconds(outcome)}, {outcome['state_nbytes'] / 2**30:.2g} GiB"


def tables(card: str, cells: list[dict]) -> str:
    """All tables of a card, in Markdown; last what is aimed at."""
    found = [f"**{card}**", ""]
    bounds = [
        f"| {cell['size']} | {cell['matmul_flops'] / 1e12:,.0f} | {cell['square_matmul_flops'] / 1e12:,.0f} "
        f"| {cell['read_bandwidth'] / 1e9:,.0f} | {cell['copy_bandwidth'] / 1e9:,.0f} |"
        for cell in _of(cells, "limits")
        if "matmul_flops" in cell
    ]
    head = "| size | TFLOP/s of its linear layers | of square matrices | GB/s read | GB/s copied |"
    found += [head, "|---|--:|--:|--:|--:|", *bounds, ""]
    for title, part, text, compared in (
        ("A prefill: time and peak memory.", "prefill", _seconds_and_peak, "contenders"),
        ("A forward of at most one segment, no cache.", "forward", _seconds, "contenders"),
        ("The same, with cache.", "forward", _seconds, "contenders_with_cache"),
        ("A decode step: time, and what is kept of the texts.", "decode", _seconds_and_state, "contenders"),
        ("A decode step as a CUDA graph.", "graph", _seconds, "contenders"),
        ("A decode step, compiled.", "compiled", _seconds, "contenders"),
        ("A training step: time and peak memory.", "training", _seconds_and_peak, "contenders"),
    ):
        if chosen := _of(cells, part):
            found += [title, "", *_pivot(chosen, text, compared), ""]
    if profiles := [*_of(cells, "profile of prefill"), *_of(cells, "profile of decode")]:
        found += ["Profiles.", "", *_profile_rows(profiles), ""]
    aims = figures(cells)
    found += [
        "| figure | measured [rounds] | aim | reached | |",
        "|---|---|---|---|---|",
        *(aim.row() for aim in aims),
    ]
    return "\n".join(found)


def points(cells: list[dict]) -> list[Point]:
    """Of plots: prefill at batch 1 and decode at each batch, of each size, over the tokens."""
    found = []
    for cell in cells:
        for name, outcome in cell.get("contenders", {}).items():
            if not outcome.get("seconds"):
                continue
            seconds, tokens = median(outcome["seconds"]), cell["tokens"]
            if cell["part"] == "prefill" and cell["batch"] == 1:
                found.append(Point(f"prefill {cell['size']}, tokens per second", name, tokens, tokens / seconds))
            if cell["part"] == "decode":
                title = f"decode {cell['size']} batch {cell['batch']}, milliseconds a step"
                found.append(Point(title, name, tokens, 1e3 * seconds))
    return found


def render(folder: Path) -> str:
    """Writes the tables of all cards beside `results.json`, and returns them."""
    text = "\n\n".join(tables(card, cells) for card, cells in _cards(folder).items())
    (folder / "table.md").write_text(text + "\n")
    return text


def draw_all(folder: Path) -> None:
    """Draws the plots of each card, in a folder of its own where there are several."""
    cards = _cards(folder)
    for card, cells in cards.items():
        place = folder / card.replace(" ", "-") if len(cards) > 1 else folder
        place.mkdir(exist_ok=True)
        plotted = points(cells)
        for plot in dict.fromkeys(point.plot for point in plotted):
            of_plot = [point for point in plotted if point.plot == plot]
            if len({point.tokens for point in of_plot}) > 1:
                draw(plot, of_plot, place)


def _cards(folder: Path) -> dict[str, list[dict]]:
    results = json.loads((folder / "results.json").read_text())
    return {card: list(of_card["cells"].values()) for card, of_card in results.items()}
