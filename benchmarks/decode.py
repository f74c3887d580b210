"""Generating after a prompt, by each library's own `generate()`: tokens per second over the prompt's length."""

from functools import partial
from statistics import median

import torch

from .report import Figure, Point, Report
from .suite import (
    ALL_HEADS,
    BFLOAT16,
    COMPILED,
    COMPILED_ALL_HEADS,
    KERNELS_ALL_HEADS,
    KERNELS_LUCIDRAINS,
    LINEAR,
    LLAMA,
    LUCIDRAINS,
    Suite,
    against_lucidrains,
)
from .timing import interleaved_seconds, ratio


PLOT = "decode, tokens per second"
LENGTHS = (2_048, 32_768, 131_072)
LONGEST = 1_048_576
NEW_TOKENS = 16
WHOLE_SEGMENTS_ONLY = (KERNELS_LUCIDRAINS, KERNELS_ALL_HEADS, COMPILED_ALL_HEADS)


@torch.no_grad()
def run(suite: Suite, report: Report) -> None:
    contenders = suite.contenders()
    models = {name: contender.build() for name, contender in contenders.items()}
    # Full attention's keys and values of a million tokens are 16 GB here, and are copied at each step.
    ours = [name for name in contenders if name.startswith("Infini") and name not in WHOLE_SEGMENTS_ONLY]
    for tokens in (*LENGTHS, LONGEST):
        length = suite.length(tokens)
        names = ours if tokens == LONGEST else [name for name in contenders if name not in WHOLE_SEGMENTS_ONLY]
        compared = {name: contenders[name] for name in names}
        rounds = 2 * suite.repeats if tokens <= 32_768 else suite.repeats
        seconds = _generate(suite, compared, models, length, NEW_TOKENS, rounds)
        report.add(
            points=[
                Point(PLOT, name, length, NEW_TOKENS / median(took), _share(suite, models[name], took))
                for name, took in seconds.items()
            ]
        )
        if tokens == 32_768:
            linear = seconds[LINEAR]
            report.add(
                [
                    Figure(
                        "generated tokens/s after 32,768 tokens against Llama with DynamicCache",
                        ratio(seconds[LLAMA], linear),
                        3.0,
                    ),
                    Figure(
                        "bfloat16 against float32, generated tokens/s",
                        ratio(linear, seconds[BFLOAT16]),
                        1.3,
                    ),
                    Figure(
                        "CPU kernels and compiled against as it is, generated tokens/s",
                        ratio(linear, seconds[COMPILED]),
                        1.0,
                    ),
                ]
            )
    _whole_segments(suite, report, contenders, models)


def _whole_segments(suite: Suite, report: Report, contenders: dict, models: dict) -> None:
    """Beside infini-transformer-pytorch, whose steps grow with the segment: all of them, from its first token on."""
    names = (LUCIDRAINS, KERNELS_LUCIDRAINS, ALL_HEADS, KERNELS_ALL_HEADS, COMPILED_ALL_HEADS)
    length = suite.length(LENGTHS[1])
    compared = {name: contenders[name] for name in names}
    seconds = _generate(suite, compared, models, length, suite.segment_length, suite.repeats)
    report.add(against_lucidrains("generated tokens/s", seconds, aim=2.0, note="generate() over a whole segment"))


def _generate(
    suite: Suite, contenders: dict, models: dict, length: int, new_tokens: int, rounds: int
) -> dict[str, list[float]]:
    # One more than has been read: the token that a generation starts from.
    ids = suite.ids(length + 1)
    runs = {}
    for name, contender in contenders.items():
        state = contender.state_after(models[name], length)
        runs[name] = partial(_next_tokens, contender, models[name], ids, state, new_tokens)
    return interleaved_seconds(runs, rounds)


def _next_tokens(contender, model, ids: torch.Tensor, state, new_tokens: int) -> None:
    read = state.get_seq_length() if hasattr(state, "get_seq_length") else ids.shape[1] - 1
    # A cache of transformers is told the whole text, of which it has read all but the last token.
    text = ids if read + 1 <= ids.shape[1] else ids[:, -1:].expand(1, read + 1)
    contender.generate(model, text, state, new_tokens)


def _share(suite: Suite, model, seconds: list[float]) -> float:
    """The least time that the weights take to be read, of the time of a token."""
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return nbytes / suite.limits.bandwidth / (median(seconds) / NEW_TOKENS)
