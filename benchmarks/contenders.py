"""
What is measured against what: models of one size, each read and continued as its own library does it best.

A state is what a contender keeps of a text; its bytes are those of its tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from examples.cpu_kernels import use_cpu_kernels
from modeling_infini import InfiniCache, InfiniConfig, InfiniForCausalLM
from modeling_infini.training import backpropagate


SAMPLING = {"do_sample": True, "top_p": 0.9, "top_k": 0}


class Contender(NamedTuple):
    """
    Attributes:
        build: a model in eval mode.
        prefill: reads ids `(1, tokens)` and returns the state.
        state_after: a state as after so many tokens, without reading them, of as many rows as the third argument says
            (one if left out): only its size matters, or not even that.
        generate: samples so many tokens from a state, after ids `(1, tokens)` that it has read but for the last.
        train: forward, loss and backward over ids `(1, tokens)`.
    """

    build: Callable[[], Any]
    prefill: Callable[[Any, torch.Tensor], Any]
    state_after: Callable[..., Any]
    generate: Callable[[Any, torch.Tensor, Any, int], None]
    train: Callable[[Any, torch.Tensor], None]


def infini(
    size: dict,
    dtype: torch.dtype = torch.float32,
    has_cpu_kernels: bool = False,
    compiles_steps: bool = False,
    detach_every_num_segments: int | None = None,
    **fields,
) -> Contender:
    """
    Ours.

    Args:
        has_cpu_kernels: after `use_cpu_kernels`.
        compiles_steps: `generate()` has a `compile_config`.
        detach_every_num_segments: where a training step ends back-propagation, going back as it goes; `None`: one pass
            forward and one back.
    """

    def build() -> InfiniForCausalLM:
        # In this dtype from the start: what stays in float32 is then what stays so in a model that is loaded.
        model = InfiniForCausalLM._from_config(InfiniConfig(**size, **fields), dtype=dtype).eval()
        return use_cpu_kernels(model) if has_cpu_kernels else model

    def prefill(model: InfiniForCausalLM, ids: torch.Tensor) -> InfiniCache:
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def state_after(model: InfiniForCausalLM, tokens: int, batch: int = 1) -> InfiniCache:
        ids = _random_ids(size, min(tokens, 4 * model.config.segment_length))
        cache = prefill(model, ids.to(model.device))
        cache.batch_repeat_interleave(batch)
        # All states are full; what is left of a longer text is a number.
        for count in (cache.counters.tokens_read, cache.counters.columns):
            count.fill_(tokens)
        return cache

    def generate(model: InfiniForCausalLM, ids: torch.Tensor, cache: InfiniCache, tokens: int) -> None:
        compilation = {"compile_config": CompileConfig(fullgraph=True, mode="default")} if compiles_steps else {}
        _generate(model, ids[:, -1:], cache, tokens, **compilation)

    def train(model: InfiniForCausalLM, ids: torch.Tensor) -> None:
        if detach_every_num_segments is None:
            return _train(model, ids)
        model.zero_grad()
        backpropagate(model, {"input_ids": ids, "labels": ids}, detach_every_num_segments=detach_every_num_segments)

    return Contender(build, prefill, state_after, generate, train)


def llama(size: dict, dtype: torch.dtype = torch.float32) -> Contender:
    def build() -> LlamaForCausalLM:
        config = LlamaConfig(**size, max_position_embeddings=2**21, attn_implementation="sdpa")
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()

    def prefill(model: LlamaForCausalLM, ids: torch.Tensor) -> DynamicCache:
        # In one call: the causal kernel of sdpa takes no mask then, and is fastest.
        return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    return Contender(build, prefill, _random_keys_and_values, _generate, _train)


def mistral(size: dict, window: int, dtype: torch.dtype = torch.float32) -> Contender:
    def build() -> MistralForCausalLM:
        config = MistralConfig(
            **size, max_position_embeddings=2**21, sliding_window=window, attn_implementation="sdpa"
        )
        return MistralForCausalLM._from_config(config, dtype=dtype).eval()

    def prefill(model: MistralForCausalLM, ids: torch.Tensor) -> DynamicCache:
        cache = DynamicCache(config=model.config)
        # The fastest calls: a sliding mask grows with the square of a call.
        for call in ids.split(window, 1):
            model(call, past_key_values=cache, logits_to_keep=1)
        return cache

    return Contender(build, prefill, _random_keys_and_values, _generate, _train)


def lucidrains(
    size: dict,
    segment_length: int,
    dtype: torch.dtype = torch.float32,
    has_cpu_kernels: bool = False,
    **fields,
) -> Contender:
    """
    infini-transformer-pytorch, whose memory is detached every second segment; its generate() takes no state, so that
    none is made but by a prefill.

    Args:
        has_cpu_kernels: after our `use_cpu_kernels`, which takes any model.
    """

    def build() -> Any:
        # Here, since a machine for one run of the benchmarks may lack this package alone.
        from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

        model = InfiniTransformer(
            num_tokens=size["vocab_size"],
            dim=size["hidden_size"],
            depth=size["num_hidden_layers"],
            dim_head=size["hidden_size"] // size["num_attention_heads"],
            heads=size["num_attention_heads"],
            **fields,
        )
        if has_cpu_kernels:
            use_cpu_kernels(model)
        return InfiniTransformerWrapper(model, segment_length=segment_length).to(dtype).eval()

    def prefill(wrapper: Any, ids: torch.Tensor):
        memories = None
        for segment in ids.split(segment_length, 1):
            _, _, memories = wrapper.model(segment, past_memories=memories, return_new_memories=True)
        return memories

    def generate(wrapper: Any, ids: torch.Tensor, state: None, tokens: int) -> None:
        # Of a prompt, it reads what its last segment has: one token here.
        prompt = ids[:, : (ids.shape[1] - 1) // segment_length * segment_length + 1]
        with redirect_stderr(StringIO()):
            wrapper.generate(prompt=prompt, seq_len=prompt.shape[1] + tokens)

    def train(wrapper: Any, ids: torch.Tensor) -> None:
        wrapper.zero_grad()
        # The wrapper keeps the last token for a target.
        wrapper(torch.cat([ids, ids[:, :1]], 1), backward=True)

    return Contender(build, prefill, lambda wrapper, tokens, batch=1: None, generate, train)


def state_nbytes(state: Any) -> int:
    """Bytes of all tensors of a cache or of a list of memories."""
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(state))


def key_value_nbytes(size: dict, tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the keys and values of full attention."""
    head_dim = size["hidden_size"] // size["num_attention_heads"]
    return 2 * size["num_hidden_layers"] * size["num_key_value_heads"] * head_dim * tokens * dtype.itemsize


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, InfiniCache):
        for layer in state.layers:
            yield from layer.states().values()
    elif isinstance(state, DynamicCache):
        for layer in state.layers:
            yield from (layer.keys, layer.values)
    else:
        for part in state:
            yield from _tensors(part)


def _random_ids(size: dict, tokens: int) -> torch.Tensor:
    return torch.randint(0, size["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(0))


def _random_keys_and_values(model: nn.Module, tokens: int, batch: int = 1) -> DynamicCache:
    config: Any = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
        states = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(*states, layer)
    return cache


def _generate(model: Any, ids: torch.Tensor, cache: Any, tokens: int, **options) -> None:
    model.generate(ids, past_key_values=cache, min_new_tokens=tokens, max_new_tokens=tokens, **SAMPLING, **options)


def _train(model: nn.Module, ids: torch.Tensor) -> None:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
