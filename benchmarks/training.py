"""
What a training step (forward, loss and backward, float32) costs over 16 segments, as ratios of throughput within one
run, and in brackets the least and the greatest ratio of a round:

1. against `LlamaForCausalLM` (sdpa) of the same size;
2. against infini-transformer-pytorch, whose wrapper trains segment by segment and detaches every second memory;
3. the delta rule against the linear one.

    python benchmarks/training.py --repeats 5
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_infini import InfiniConfig, InfiniForCausalLM
from sizes import SIZE
from timing import interleaved_seconds


# infini-transformer-pytorch has as many KV heads as heads, and makes its intermediate size of the width.
LUCIDRAINS_SIZE = {**SIZE, "intermediate_size": 1365, "num_key_value_heads": 8}
SHORT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 85,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

NUM_SEGMENTS = 16
LLAMA_TARGETS = {128: 1.0, 1024: 2.5}
LUCIDRAINS_TARGET = 1.3
DELTA_TARGET = 0.85


def infini(size: dict, **fields) -> InfiniForCausalLM:
    torch.manual_seed(0)
    return InfiniForCausalLM(InfiniConfig(**size, **fields)).train()


def llama(size: dict, length: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**size, max_position_embeddings=length, attn_implementation="sdpa")
    return LlamaForCausalLM(config).train()


def lucidrains(size: dict, segment_length: int) -> InfiniTransformerWrapper:
    torch.manual_seed(0)
    model = InfiniTransformer(
        num_tokens=size["vocab_size"],
        dim=size["hidden_size"],
        depth=size["num_hidden_layers"],
        dim_head=size["hidden_size"] // size["num_attention_heads"],
        heads=size["num_attention_heads"],
    )
    return InfiniTransformerWrapper(model, segment_length=segment_length).train()


def train_step(model: nn.Module, ids: torch.Tensor) -> None:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()


def lucidrains_train_step(wrapper: InfiniTransformerWrapper, ids: torch.Tensor) -> None:
    wrapper.zero_grad()
    wrapper(ids, backward=True)


def print_ratio(title: str, target: float, numerator: list[float], denominator: list[float], tokens: int) -> None:
    """Prints throughput against another's, from the seconds of both in each round."""
    ratio = median(denominator) / median(numerator)
    rounds = [other / ours for ours, other in zip(numerator, denominator)]
    print(
        f"{title}: {ratio:.3f} x [{min(rounds):.3f}-{max(rounds):.3f}] (at least {target:.2f}), "
        f"{tokens / median(numerator):.0f} tokens/s",
        flush=True,
    )


def train_steps(segment_length: int, repeats: int, size: dict, lucidrains_size: dict) -> None:
    length = NUM_SEGMENTS * segment_length
    ids = torch.randint(0, size["vocab_size"], (1, length + 1), generator=torch.Generator().manual_seed(0))
    # The wrapper predicts the last token as well; it needs one more than it reads.
    runs: dict[str, Callable] = {
        "llama": partial(train_step, llama(size, length), ids[:, :-1]),
        "linear": partial(train_step, infini(size, segment_length=segment_length), ids[:, :-1]),
        "delta": partial(
            train_step, infini(size, segment_length=segment_length, use_mem_delta_rule=True), ids[:, :-1]
        ),
        "lucidrains": partial(lucidrains_train_step, lucidrains(lucidrains_size, segment_length), ids),
        "all heads": partial(train_step, infini(lucidrains_size, segment_length=segment_length), ids[:, :-1]),
    }
    seconds = interleaved_seconds(runs, repeats)
    target = LLAMA_TARGETS.get(segment_length, 1.0)
    step = f"training step of {length:6,} tokens, N = {segment_length:4}"
    print_ratio(f"1. {step}, against Llama", target, seconds["linear"], seconds["llama"], length)
    print_ratio(
        f"2. {step}, against infini-transformer-pytorch",
        LUCIDRAINS_TARGET,
        seconds["all heads"],
        seconds["lucidrains"],
        length,
    )
    print_ratio(f"3. {step}, delta against linear", DELTA_TARGET, seconds["delta"], seconds["linear"], length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="tiny models and segments: does it run?")
    parser.add_argument("--segment-lengths", type=int, nargs="+", default=list(LLAMA_TARGETS), metavar="N")
    arguments = parser.parse_args()
    if arguments.short:
        train_steps(8, arguments.repeats, SHORT, SHORT)
        return
    for segment_length in arguments.segment_lengths:
        train_steps(segment_length, arguments.repeats, SIZE, LUCIDRAINS_SIZE)


if __name__ == "__main__":
    main()
