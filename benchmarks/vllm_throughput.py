"""
Four prompts at once in vLLM, beside the same prompts by `generate()`, and beside a Llama of the same size in vLLM:
tokens per second and seconds to the first token. Random models on the CPU, on one thread, with weights in float32.

    python -m benchmarks.vllm_throughput                          # prompts of up to 2,048, 8,192 and 32,768 tokens
    python -m benchmarks.vllm_throughput --lengths 2048
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from functools import partial
from statistics import mean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING


# Before vLLM is imported, which reads it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modeling_infini import InfiniConfig, InfiniForCausalLM


if TYPE_CHECKING:
    from vllm import LLM


SIZE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "eos_token_id": None,
}
MEMORY = {"segment_length": 256, "local_attention": "sliding", "num_sink_tokens": 4}
NEW_TOKENS = 128
# Of four prompts, in parts of the longest.
PARTS = (0.7, 0.8, 0.9, 1.0)

# When each request has its first token, and when all have their last.
Times = tuple[list[float], float]


def in_vllm(llm: "LLM", prompts: list[list[int]]) -> Times:
    from vllm import SamplingParams

    engine, first, begin = llm.llm_engine, {}, time.perf_counter()
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False)
    for name, ids in enumerate(prompts):
        engine.add_request(str(name), {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - begin)
    return list(first.values()), time.perf_counter() - begin


def by_generate(model: PreTrainedModel, batch_size: int, prompts: list[list[int]]) -> Times:
    first, begin = [], time.perf_counter()
    for start in range(0, len(prompts), batch_size):
        batch, seen = prompts[start : start + batch_size], []
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])

        def note(ids: torch.Tensor, scores: torch.Tensor, seen: list[float] = seen, **kwargs) -> torch.Tensor:
            seen.append(time.perf_counter() - begin)
            return torch.zeros(len(ids), dtype=torch.bool)

        model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, stopping_criteria=[note])
        first += seen[:1] * len(batch)
    return first, time.perf_counter() - begin


def engine(model: PreTrainedModel, length: int) -> "LLM":
    # Installed in an environment of its own.
    from vllm import LLM

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return LLM(
            folder,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=length + NEW_TOKENS,
            max_num_seqs=4,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=2**31,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="of the longest prompt")
    lengths = parser.parse_args().lengths
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = InfiniForCausalLM(InfiniConfig(**SIZE, **MEMORY)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**SIZE)).eval()
    ways: dict[str, Callable[[list[list[int]]], Times]] = {
        "vLLM": partial(in_vllm, engine(model, max(lengths))),
        "`generate()`, one by one": partial(by_generate, model, 1),
        "`generate()`, a padded batch": partial(by_generate, model, len(PARTS)),
        "a Llama in vLLM": partial(in_vllm, engine(llama, max(lengths))),
    }
    gc.collect()
    print("| longest prompt | how | tokens per second | of vLLM's | seconds to the first token, mean |")
    print("|---|---|---|---|---|")
    for run in ways.values():
        run([[1] * 300] * len(PARTS))
    for length in lengths:
        prompts = [torch.randint(1, SIZE["vocab_size"], (int(part * length),)).tolist() for part in PARTS]
        tokens, of_vllm = sum(map(len, prompts)) + NEW_TOKENS * len(prompts), None
        for name, run in ways.items():
            first, seconds = run(prompts)
            rate = tokens / seconds
            of_vllm = of_vllm or rate
            print(f"| {length:,} | {name} | {rate:,.0f} | {rate / of_vllm:.2f} | {mean(first):.1f} |", flush=True)


if __name__ == "__main__":
    main()
