"""
What exact back-propagation through a long sequence costs, chunk by chunk:

1. peak memory of a training step on 131,072 tokens, against one on 8,192 tokens (each in a process of its own);
2. its time per token, against that of the plain step (forward and backward over the whole sequence at once).

    python -m benchmarks.chunked_training
"""

import argparse
import subprocess
import sys
import time
from statistics import median

import torch

from modeling_infini import InfiniConfig, InfiniForCausalLM
from modeling_infini.training import backpropagate

from .peak_memory import peak_nbytes
from .sizes import SEGMENT_LENGTH, SIZE


LONG, SHORT = 131_072, 8_192


def step(model: InfiniForCausalLM, ids: torch.Tensor, chunk_segments: int | None) -> float:
    """Seconds of one training step on `ids` `(1, tokens)`; `None`: the plain step, without chunks or cache."""
    model.zero_grad()
    start = time.perf_counter()
    if chunk_segments is None:
        model(ids, labels=ids, use_cache=False).loss.backward()
    else:
        backpropagate(model, {"input_ids": ids, "labels": ids}, chunk_segments=chunk_segments)
    return time.perf_counter() - start


def peak_memory(arguments: argparse.Namespace, tokens: int) -> int:
    """Peak resident memory, in bytes, of a process that takes one step on `tokens` tokens."""
    command = [sys.executable, "-m", "benchmarks.chunked_training", "--step", str(tokens)]
    command += ["--chunk-segments", str(arguments.chunk_segments)]
    command += ["--local-attention", arguments.local_attention]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk-segments", type=int, default=8, help="segments in a chunk (default: %(default)s)")
    parser.add_argument("--local-attention", choices=["segment", "sliding"], default="segment")
    parser.add_argument("--repeats", type=int, default=3, help="timed plain steps (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="a sixteenth of all lengths, for a smoke test")
    parser.add_argument("--step", type=int, metavar="TOKENS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = InfiniForCausalLM(
        InfiniConfig(**SIZE, segment_length=SEGMENT_LENGTH, local_attention=arguments.local_attention)
    )
    if arguments.step:
        step(model, torch.randint(0, SIZE["vocab_size"], (1, arguments.step)), arguments.chunk_segments)
        print(peak_nbytes())
        return

    long, short = (LONG // 16, SHORT // 16) if arguments.short else (LONG, SHORT)
    what = f'"{arguments.local_attention}", chunks of {arguments.chunk_segments} segments of {SEGMENT_LENGTH}'
    peaks = {tokens: peak_memory(arguments, tokens) for tokens in (long, short)}
    print(
        f"1. peak memory of a step on {long:,} tokens: {peaks[long] / peaks[short]:.3f} x that on {short:,} "
        f"(at most 1.25), {peaks[long] / 1e6:.0f} MB; {what}",
        flush=True,
    )
    ids = torch.randint(0, SIZE["vocab_size"], (1, long))
    step(model, ids[:, :short], None)
    before = [step(model, ids[:, :short], None) for _ in range(arguments.repeats)]
    seconds = step(model, ids, arguments.chunk_segments)
    after = [step(model, ids[:, :short], None) for _ in range(arguments.repeats)]
    plain = median(before + after) / short
    ratio = seconds / long / plain
    print(
        f"2. time per token of the step on {long:,} tokens: {ratio:.3f} x that of the plain step on {short:,} "
        f"(at most 1.50), {long / seconds:.0f} against {1 / plain:.0f} tokens/s; {what}"
    )


if __name__ == "__main__":
    main()
