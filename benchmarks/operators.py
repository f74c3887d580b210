"""
Where the time of a prefill goes, by operator: shares of the time on the CPU, by torch's profiler.

    python -m benchmarks.operators --local-attention sliding --rule delta
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from .contenders import infini
from .sizes import SEGMENT_LENGTH, SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="(default: %(default)s)")
    parser.add_argument("--local-attention", choices=["segment", "sliding"], default="segment")
    parser.add_argument("--rule", choices=["linear", "delta"], default="linear")
    parser.add_argument("--top", type=int, default=15, help="operators to show (default: %(default)s)")
    options = parser.parse_args()
    fields = {"local_attention": options.local_attention, "use_mem_delta_rule": options.rule == "delta"}
    contender = infini(SIZE, segment_length=SEGMENT_LENGTH, **fields)
    model, ids = contender.build(), torch.randint(0, SIZE["vocab_size"], (1, options.tokens))
    with torch.no_grad():
        contender.prefill(model, ids)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            contender.prefill(model, ids)
    operators = sorted(profiler.key_averages(), key=lambda operator: -operator.self_cpu_time_total)
    total = sum(operator.self_cpu_time_total for operator in operators)
    print("| operator | share of the time | calls |\n|---|--:|--:|")
    for operator in operators[: options.top]:
        print(f"| `{operator.key}` | {operator.self_cpu_time_total / total:.1%} | {operator.count} |")


if __name__ == "__main__":
    main()
