"""Timing on a machine that others use: runs take turns, so that a slow moment meets them all."""

import time
from collections.abc import Callable
from statistics import median


def interleaved_seconds(runs: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run in each of `repeats` rounds, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved_medians(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each run; see [`interleaved_seconds`]."""
    return {name: median(values) for name, values in interleaved_seconds(runs, repeats).items()}
