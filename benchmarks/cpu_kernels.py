"""
What `use_cpu_kernels` and compiled decode steps give a model on this machine: tokens per second beside the model as it
is, in one process, taking turns.

    python -m benchmarks.cpu_kernels                     # SmolLM2-135M, converted for the occasion
    python -m benchmarks.cpu_kernels --model my-model --dtype bfloat16
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig

from examples.cpu_kernels import use_cpu_kernels
from infini_transformers.conversion import convert_to_infini
from infini_transformers.evaluation.resources import smollm2_file

from .timing import interleaved_seconds, ratio


AS_IT_IS, KERNELS, COMPILED = "as it is", "CPU kernels", "CPU kernels, compiled"


def prefill(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids, past_key_values=model.new_cache(), logits_to_keep=1)


def generate(model: Any, ids: torch.Tensor, new_tokens: int, **options) -> None:
    # A few tokens to start from: a step takes the same time after any prompt.
    model.generate(ids[:, :8], min_new_tokens=new_tokens, max_new_tokens=new_tokens, **options)


def train(model: Any, ids: torch.Tensor) -> None:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()


def measure(name: str, tokens: int, runs: dict[str, Callable], repeats: int) -> None:
    seconds = interleaved_seconds(runs, repeats)
    for how, took in seconds.items():
        print(f"| {name} | {how} | {tokens / median(took):.4g} | {ratio(seconds[AS_IT_IS], took)} |", flush=True)


@contextmanager
def folder_of(model: str | None) -> Iterator[str]:
    if model is not None:
        yield model
        return
    with TemporaryDirectory() as folder:
        convert_to_infini(smollm2_file(), folder, segment_length=256)
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of an Infini-attention model (default: SmolLM2, converted)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=8192, help="of the prompt (default: %(default)s)")
    parser.add_argument("--trained-tokens", type=int, default=1024, help="of a training step (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="generated (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    with folder_of(options.model) as folder:
        load = partial(
            AutoModelForCausalLM.from_pretrained, folder, dtype=getattr(torch, options.dtype), trust_remote_code=True
        )
        models = {AS_IT_IS: load().eval(), KERNELS: use_cpu_kernels(load().eval())}
    ids = torch.randint(0, models[AS_IT_IS].config.vocab_size, (1, options.tokens))
    print("| | | tokens/s | x [rounds] |\n|---|---|--:|--:|")
    measure("prefill", options.tokens, {how: partial(prefill, m, ids) for how, m in models.items()}, options.repeats)
    steps = {how: partial(generate, m, ids, options.new_tokens) for how, m in models.items()}
    compilation = CompileConfig(mode="default")
    steps[COMPILED] = partial(generate, models[KERNELS], ids, options.new_tokens, compile_config=compilation)
    measure("generated", options.new_tokens, steps, options.repeats)
    trained = ids[:, : options.trained_tokens]
    steps = {how: partial(train, m.train(), trained) for how, m in models.items()}
    measure("training step", trained.shape[1], steps, options.repeats)


if __name__ == "__main__":
    main()
