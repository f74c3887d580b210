"""What is kept of a text, and the peak memory of the process that reads it."""

import subprocess
import sys

import torch

from .contenders import key_value_nbytes, state_nbytes
from .peak_memory import peak_nbytes
from .report import Figure, Point, Report
from .suite import LINEAR, LLAMA, LUCIDRAINS, MISTRAL, SLIDING, Suite
from .timing import Ratio


STATE_PLOT = "state, bytes"
PEAK_PLOT = "peak memory of a prefill, MiB"
LENGTHS = (2_048, 32_768, 131_072, 1_048_576)
PEAK_LENGTHS = (2_048, 16_384)


@torch.no_grad()
def run(suite: Suite, report: Report) -> None:
    for name, local_attention in ((LINEAR, "segment"), (SLIDING, "sliding")):
        contender = suite.contenders()[name]
        nbytes = state_nbytes(contender.state_after(contender.build(), suite.length(LENGTHS[-1])))
        report.add(points=[Point(STATE_PLOT, name, suite.length(tokens), nbytes) for tokens in LENGTHS])
        full = key_value_nbytes(suite.size, suite.length(LENGTHS[-1]))
        share = nbytes / full
        report.add(
            [
                Figure(
                    f"state after 1,048,576 tokens, {local_attention!r}, against Llama's keys and values",
                    Ratio(share, share, share),
                    1 / 1000,
                    is_least=False,
                    note=f"{nbytes / 2**20:.1f} against {full / 2**20:,.0f} MiB",
                )
            ]
        )
    report.add(
        points=[
            Point(
                STATE_PLOT,
                LLAMA,
                suite.length(tokens),
                key_value_nbytes(suite.size, suite.length(tokens)),
            )
            for tokens in LENGTHS
        ]
    )
    for tokens in PEAK_LENGTHS:
        for name in (LINEAR, SLIDING, LLAMA, MISTRAL, LUCIDRAINS):
            length = suite.length(tokens)
            report.add(points=[Point(PEAK_PLOT, name, length, prefill_peak_nbytes(suite, name, length) / 2**20)])


def prefill_peak_nbytes(suite: Suite, name: str, tokens: int) -> int:
    """Peak resident memory of a process that builds a contender and reads `tokens` tokens."""
    fields = (suite.size, suite.all_heads_size, suite.segment_length, suite.scale, suite.repeats)
    script = f"from {__name__} import prefill_here; prefill_here({fields!r}, {name!r}, {tokens})"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return int(done.stdout)


@torch.no_grad()
def prefill_here(fields: tuple, name: str, tokens: int) -> None:
    """Reads `tokens` tokens and prints the peak memory of this process in bytes."""
    suite = Suite(*fields)
    contender = suite.contenders()[name]
    contender.prefill(contender.build(), suite.ids(tokens))
    print(peak_nbytes())
