"""
Infini-attention beside full attention, a sliding window and infini-transformer-pytorch: models of one size, with
random weights, in one process, taking turns.

    python -m benchmarks --output docs/performance
    python -m benchmarks --short                    # tiny models: does it run?
    python -m benchmarks --sections prefill decode

Each figure is a ratio of medians, with the least and the greatest ratio of a round. Lengths from 2,048 to 131,072
tokens; full attention is read to 65,536, and extrapolated from there.
"""

import argparse
import os
import platform
from pathlib import Path

import torch
import transformers

from . import decode, memory, prefill, training
from .machine import measure
from .report import Report
from .sizes import ALL_HEADS_SIZE, SEGMENT_LENGTH, SIZE
from .suite import Suite


SECTIONS = {
    "decode": decode.run,
    "training": training.run,
    "memory": memory.run,
    "prefill": prefill.run,
}
SHORT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 85,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=2, help="rounds of the longest runs (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for results.json, table.md and the plots")
    parser.add_argument("--short", action="store_true", help="tiny models and texts, for a smoke test")
    arguments = parser.parse_args()

    if arguments.short:
        size = {**SHORT, "num_key_value_heads": 1}
        suite = Suite(size, {**SHORT, "num_key_value_heads": 2}, segment_length=16, scale=64, repeats=1)
    else:
        suite = Suite(SIZE, ALL_HEADS_SIZE, SEGMENT_LENGTH, scale=1, repeats=arguments.repeats)
    torch.manual_seed(0)
    suite.limits = measure(suite.size, suite.length(4096))
    report = Report(
        {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **suite.limits._asdict(),
        }
    )
    print(
        f"{torch.get_num_threads()} threads; matrix products {suite.limits.flops / 1e9:.0f} GFLOP/s, with CPU kernels "
        f"{suite.limits.kernel_flops / 1e9:.0f}; memory {suite.limits.bandwidth / 1e9:.1f} GB/s",
        flush=True,
    )
    for name in arguments.sections:
        SECTIONS[name](suite, report)
        if arguments.output:
            report.save(arguments.output)
    print(report.table())


if __name__ == "__main__":
    main()
