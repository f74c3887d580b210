"""Reading a prompt of which the last logits are asked for: tokens per second over its length."""

from functools import partial
from statistics import median

import torch

from modeling_infini.modeling_infini import PIECE_TOKENS

from .machine import prefill_flops
from .report import Figure, Point, Report
from .suite import (
    COMPILED,
    COMPILED_ALL_HEADS,
    KERNELS,
    LINEAR,
    LLAMA,
    SLIDING,
    Suite,
    against_lucidrains,
)
from .timing import Ratio, interleaved_seconds, ratio


PLOT = "prefill, tokens per second"
LENGTHS = (2_048, 8_192, 32_768)
LONGEST = 131_072


@torch.no_grad()
def run(suite: Suite, report: Report) -> None:
    contenders = suite.contenders()
    for name in (COMPILED, COMPILED_ALL_HEADS):  # A prompt is not compiled.
        del contenders[name]
    models = {name: contender.build() for name, contender in contenders.items()}

    def runs(tokens: int, names=tuple(contenders)) -> dict:
        ids = suite.ids(suite.length(tokens))
        return {name: partial(contenders[name].prefill, models[name], ids) for name in names}

    def points(tokens: int, seconds: dict[str, list[float]]) -> list[Point]:
        length = suite.length(tokens)
        shares = {}
        for name in (LINEAR, SLIDING, KERNELS):
            if name in seconds:
                shares[name] = median(_shares(suite, name, length, seconds[name]))
        return [Point(PLOT, name, length, length / median(took), shares.get(name)) for name, took in seconds.items()]

    for tokens in LENGTHS:
        # Rounds enough for the short ones, few for what takes a minute.
        rounds = max(suite.repeats, min(5, suite.repeats * LENGTHS[1] // tokens))
        seconds = interleaved_seconds(runs(tokens), rounds, warm_up=tokens == LENGTHS[0])
        report.add(points=points(tokens, seconds))
    title = "prefill of 32,768 tokens"
    report.add(
        [
            Figure(f"{title} against Llama (sdpa)", ratio(seconds[LLAMA], seconds[LINEAR]), 4.5),
            *against_lucidrains(title, seconds),
        ]
    )
    for name, products in ((LINEAR, "PyTorch's"), (KERNELS, "CPU kernels, of oneDNN's")):
        shares = _shares(suite, name, suite.length(LENGTHS[-1]), seconds[name])
        report.add(
            [
                Figure(
                    f"share of the measured matrix throughput in that prefill, {products}",
                    Ratio(median(shares), min(shares), max(shares)),
                    0.65,
                    note="the products that cannot be left out, causal half of attention",
                )
            ]
        )
    _longest(suite, report, runs, points)


def _longest(suite: Suite, report: Report, runs, points) -> None:
    """131,072 tokens beside as many in texts of 2,048, and full attention extrapolated from half of that."""
    short = runs(LENGTHS[0], [LINEAR])[LINEAR]

    def many_short() -> None:
        for _ in range(LONGEST // LENGTHS[0]):
            short()

    compared = {**runs(LONGEST, [LINEAR]), "many short": many_short}
    seconds = interleaved_seconds(compared, max(1, suite.repeats - 1), warm_up=False)
    many = seconds.pop("many short")
    report.add(points=points(LONGEST, seconds))
    figure = Figure(
        "prefill throughput at 131,072 tokens against its own at 2,048",
        ratio(many, seconds[LINEAR]),
        0.95,
        note="as many tokens on both sides",
    )
    report.add([figure])

    once = interleaved_seconds(runs(LONGEST // 2, [LLAMA]), 1, warm_up=False)[LLAMA]
    report.add(points=points(LONGEST // 2, {LLAMA: once}))
    measured = {(point.plot, point.contender, point.tokens): point for point in report.points}
    quarter = measured[PLOT, LLAMA, suite.length(LENGTHS[-1])]
    full = extrapolated_seconds(quarter.tokens / quarter.value, median(once))
    extrapolated = full / median(seconds[LINEAR])
    report.add(
        [
            Figure(
                "prefill of 131,072 tokens against Llama (sdpa)",
                Ratio(extrapolated, extrapolated, extrapolated),
                15,
                note="Llama extrapolated from 32,768 and 65,536 tokens by a T + b T²",
            )
        ]
    )


def extrapolated_seconds(quarter: float, half: float) -> float:
    """Of T tokens, by the a T + b T² that takes `quarter` seconds for T / 4 and `half` for T / 2."""
    return 6 * half - 8 * quarter


def needed_flops(size: dict, length: int, segment_length: int, local_attention: str) -> float:
    """The operations that reading a text cannot do without, where the last logits alone are asked for."""
    # A longer prompt is read in calls, of which only the last asks for logits.
    written = length - 1 if length > PIECE_TOKENS else 0
    return prefill_flops(size, length, segment_length, local_attention, written)


def _flops(suite: Suite, length: int, local_attention: str) -> float:
    return needed_flops(suite.size, length, suite.segment_length, local_attention)


def _shares(suite: Suite, name: str, length: int, seconds: list[float]) -> list[float]:
    """Of the rate of matrix products alone, as the contender computes them, in each round."""
    flops = _flops(suite, length, "sliding" if name == SLIDING else "segment")
    limit = suite.limits.kernel_flops if name == KERNELS else suite.limits.flops
    return [flops / took / limit for took in seconds]
