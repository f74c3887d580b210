"""
The four figures that say whether memory and streams cost what they should, as ratios of medians within one run:

1. a forward of at most one segment, against `LlamaForCausalLM` of the same size;
2. prefill throughput at 64 segments, against that at one;
3. a decode step after 1,000,000 tokens, against one after 1,000;
4. peak memory while streaming 262,144 tokens, against 16,384.

    python -m benchmarks.core
"""

import argparse
import copy
import subprocess
import sys
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_infini import InfiniCache, InfiniConfig, InfiniForCausalLM

from .peak_memory import peak_nbytes
from .sizes import SEGMENT_LENGTH, SIZE
from .timing import interleaved_medians


SMALL = {**SIZE, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}


def infini(size: dict, **fields) -> InfiniForCausalLM:
    torch.manual_seed(0)
    return InfiniForCausalLM(InfiniConfig(**size, segment_length=SEGMENT_LENGTH, **fields)).eval()


def short_forward(repeats: int) -> None:
    torch.manual_seed(0)
    llama, ours = LlamaForCausalLM(LlamaConfig(**SIZE)).eval(), infini(SIZE)
    for length in (SEGMENT_LENGTH // 4, SEGMENT_LENGTH):
        ids = torch.randint(0, SIZE["vocab_size"], (1, length))
        for use_cache in (False, True):
            runs = {
                "llama": partial(llama, ids, use_cache=use_cache),
                "ours": partial(ours, ids, use_cache=use_cache),
            }
            seconds = interleaved_medians(runs, repeats * SEGMENT_LENGTH // length)
            ratio = seconds["ours"] / seconds["llama"]
            cache = "with cache" if use_cache else "no cache"
            print(f"1. forward of {length:4} tokens, {cache:10}: {ratio:.3f} x Llama (at most 1.05)", flush=True)


def long_prefill(repeats: int) -> None:
    for fields in ({}, {"use_mem_delta_rule": True}):
        model = infini(SIZE, **fields)
        ids = torch.randint(0, SIZE["vocab_size"], (1, 64 * SEGMENT_LENGTH))
        runs = {
            "one": partial(model, ids[:, :SEGMENT_LENGTH], logits_to_keep=1),
            "many": partial(model, ids, logits_to_keep=1),
        }
        seconds = interleaved_medians(runs, repeats)
        ratio = 64 * seconds["one"] / seconds["many"]
        rule = "delta" if fields else "linear"
        print(
            f"2. prefill of 64 segments, {rule:6}: {ratio:.3f} x the throughput at 1 segment (at least 0.90), "
            f"{64 * SEGMENT_LENGTH / seconds['many']:.0f} tokens/s"
        )


def decode_step(repeats: int) -> None:
    for local_attention in ("segment", "sliding"):
        model = infini(SIZE, local_attention=local_attention)
        ids = torch.randint(0, SIZE["vocab_size"], (1, 1000))
        caches = {1000: InfiniCache(model.config)}
        model(ids, past_key_values=caches[1000])
        caches[1_000_000] = copy.deepcopy(caches[1000])
        for count in (caches[1_000_000].counters.tokens_read, caches[1_000_000].counters.columns):
            count.fill_(1_000_000)
        runs = {str(tokens): partial(model, ids[:, :1], past_key_values=cache) for tokens, cache in caches.items()}
        seconds = interleaved_medians(runs, 20 * repeats)
        ratio = seconds["1000000"] / seconds["1000"]
        print(
            f'3. decode step after 1,000,000 tokens, "{local_attention}": {ratio:.3f} x the step after 1,000 '
            f"(at most 1.05), {1000 * seconds['1000000']:.1f} ms"
        )


def stream(tokens: int) -> None:
    """Reads `tokens` tokens and prints the peak memory of this process in bytes."""
    model = infini(SMALL)
    cache = InfiniCache(model.config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(tokens // 4096):
        ids = torch.randint(0, SMALL["vocab_size"], (1, 4096), generator=generator)
        model(ids, past_key_values=cache, logits_to_keep=1)
    print(peak_nbytes())


def streaming_memory() -> None:
    peak = {}
    for tokens in (16_384, 262_144):
        command = [sys.executable, "-m", "benchmarks.core", "--stream", str(tokens)]
        peak[tokens] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"4. peak memory while streaming 262,144 tokens: {peak[262_144] / peak[16_384]:.3f} x that of 16,384 "
        f"(at most 1.10), {peak[262_144] / 2**20:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timed repeats of each run (default: %(default)s)")
    parser.add_argument("--stream", type=int, metavar="TOKENS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with torch.no_grad():
        if arguments.stream:
            stream(arguments.stream)
            return
        short_forward(arguments.repeats)
        long_prefill(arguments.repeats)
        decode_step(arguments.repeats)
        streaming_memory()


if __name__ == "__main__":
    main()
