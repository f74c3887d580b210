"""Timing on a machine that others use: runs take turns, so that a slow moment meets them all."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """A ratio of medians, with the least and the greatest ratio of a round."""

    value: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.least:.3g}-{self.greatest:.3g}]"


def clock_of(device: str) -> Callable[[], float]:
    """A clock that waits for what the device has to do."""
    if device == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return clock


def interleaved_seconds(
    runs: Mapping[str, Callable],
    repeats: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each of `repeats` rounds, after one that is not counted unless all ran before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for is_counted in [False] * warm_up + [True] * repeats:
        for name, run in runs.items():
            start = clock()
            run()
            if is_counted:
                seconds[name].append(clock() - start)
    return seconds


def interleaved_medians(runs: Mapping[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of each run; see [`interleaved_seconds`]."""
    return {name: median(values) for name, values in interleaved_seconds(runs, repeats).items()}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of two runs that took turns."""
    rounds = [numerator / denominator for numerator, denominator in zip(numerators, denominators)]
    return Ratio(median(numerators) / median(denominators), min(rounds), max(rounds))
