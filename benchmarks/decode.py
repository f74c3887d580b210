"""Generating after a prompt, by each library's own `generate()`: tokens per second over the prompt's length."""

from functools import partial
from statistics import median

import torch

from .report import Figure, Point, Report
from .suite import ALL_HEADS, BFLOAT16, COMPILED, LINEAR, LLAMA, LUCIDRAINS, Suite
from .timing import interleaved_seconds, ratio


PLOT = "decode, tokens per second"
LENGTHS = (2_048, 32_768, 131_072)
LONGEST = 1_048_576
NEW_TOKENS = 16


@torch.no_grad()
def run(suite: Suite, report: Report) -> None:
    contenders = suite.contenders()
    models = {name: contender.build() for name, contender in contenders.items()}
    # Full attention's keys and values of a million tokens are 16 GB here, and are copied at each step.
    ours = [name for name in contenders if name.startswith("Infini")]
    for tokens in (*LENGTHS, LONGEST):
        length = suite.length(tokens)
        names = ours if tokens == LONGEST else list(contenders)
        seconds = _generate(suite, {name: contenders[name] for name in names}, models, length)
        report.add(
            points=[
                Point(PLOT, name, length, NEW_TOKENS / median(took), _share(suite, models[name], took))
                for name, took in seconds.items()
            ]
        )
        if tokens == 32_768 and suite.compiles:
            compiled = seconds[COMPILED]
            eager = seconds[LINEAR]
            report.add([Figure("compiled against not, generated tokens/s", ratio(eager, compiled), 1.0)])
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
                        "generated tokens/s against infini-transformer-pytorch's generate",
                        ratio(seconds[LUCIDRAINS], seconds[ALL_HEADS]),
                        2.0,
                    ),
                    Figure(
                        "bfloat16 against float32, generated tokens/s",
                        ratio(linear, seconds[BFLOAT16]),
                        1.3,
                    ),
                ]
            )


def _generate(suite: Suite, contenders: dict, models: dict, length: int) -> dict[str, list[float]]:
    # One more than has been read: the token that a generation starts from.
    ids = suite.ids(length + 1)
    runs = {}
    for name, contender in contenders.items():
        state = contender.state_after(models[name], length)
        runs[name] = partial(_next_tokens, contender, models[name], ids, state)
    return interleaved_seconds(runs, 2 * suite.repeats)


def _next_tokens(contender, model, ids: torch.Tensor, state) -> None:
    read = state.get_seq_length() if hasattr(state, "get_seq_length") else ids.shape[1] - 1
    # A cache of transformers is told the whole text, of which it has read all but the last token.
    text = ids if read + 1 <= ids.shape[1] else ids[:, -1:].expand(1, read + 1)
    contender.generate(model, text, state, NEW_TOKENS)


def _share(suite: Suite, model, seconds: list[float]) -> float:
    """The least time that the weights take to be read, of the time of a token."""
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return nbytes / suite.limits.bandwidth / (median(seconds) / NEW_TOKENS)
