"""
A training step, forward, loss and backward in float32: tokens per second over the length.

    python -m benchmarks.training --segment-lengths 128 1024     # 16 segments each
"""

import argparse
from functools import partial
from statistics import median

from .report import Figure, Point, Report
from .sizes import ALL_HEADS_SIZE, SIZE
from .suite import (
    ALL_HEADS,
    DELTA,
    KERNELS_ALL_HEADS,
    KERNELS_LUCIDRAINS,
    LINEAR,
    LLAMA,
    LUCIDRAINS,
    SLIDING,
    Suite,
    against_lucidrains,
)
from .timing import interleaved_seconds, ratio


PLOT = "training step, tokens per second"
LENGTHS = (2_048, 8_192)
NUM_SEGMENTS = 16
TRAINED = (
    LINEAR,
    DELTA,
    SLIDING,
    LLAMA,
    LUCIDRAINS,
    KERNELS_LUCIDRAINS,
    ALL_HEADS,
    KERNELS_ALL_HEADS,
)


def seconds_of_a_step(suite: Suite, length: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Of each contender, on one text of `length` tokens."""
    contenders, ids = suite.contenders(), suite.ids(length)
    runs = {name: partial(contenders[name].train, contenders[name].build().train(), ids) for name in TRAINED}
    return interleaved_seconds(runs, suite.repeats, warm_up)


def figures(title: str, seconds: dict[str, list[float]]) -> list[Figure]:
    return [
        *against_lucidrains(title, seconds, note="both detach the memory every second segment"),
        Figure(f"{title}, delta rule against linear", ratio(seconds[LINEAR], seconds[DELTA]), 0.85),
    ]


def run(suite: Suite, report: Report) -> None:
    for tokens in LENGTHS:
        length = suite.length(tokens)
        seconds = seconds_of_a_step(suite, length, warm_up=tokens == LENGTHS[0])
        report.add(points=[Point(PLOT, name, length, length / median(took)) for name, took in seconds.items()])
    report.add(figures("training step of 8,192 tokens", seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segment-lengths", type=int, nargs="+", default=[128, 1024], metavar="N")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    arguments = parser.parse_args()
    report = Report()
    for segment_length in arguments.segment_lengths:
        suite = Suite(SIZE, ALL_HEADS_SIZE, segment_length, scale=1, repeats=arguments.repeats)
        length = NUM_SEGMENTS * segment_length
        seconds = seconds_of_a_step(suite, length)
        title = f"training step of {length:,} tokens, N = {segment_length:,},"
        against_llama = ratio(seconds[LLAMA], seconds[LINEAR])
        report.add([Figure(f"{title} against Llama (sdpa)", against_llama, 1.0), *figures(title, seconds)])


if __name__ == "__main__":
    main()
