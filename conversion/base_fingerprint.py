"""Which base a memory belongs to: a hash of the base's weights, whatever files or model hold them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_infini.fingerprint import some_elements

from .checkpoints import Checkpoint, is_memory_weight, require_float


# Buffers that old Llama checkpoints hold beside their weights.
LEGACY_BUFFER = "rotary_emb.inv_freq"

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def base_fingerprint(source: Checkpoint | nn.Module, dtype: torch.dtype | None = None) -> str:
    """
    A hash of all weights but the memory's: of some elements of each, rounded to bfloat16, so that the same base in
    float32 and in bfloat16 has one. Shards, file names and a head that repeats the embeddings do not change it; nor
    does a conversion. Training does: it changes nearly all elements of what it trains.

    Args:
        source: a checkpoint, of which one weight at a time is read; or a causal language model.
        dtype: that the weights are to have; `None`: their own.

    Raises:
        ValueError: if a weight is quantized, sharded over processes, or not on this machine's CPU or GPU, or the model
            has another head than a language model's, or none.
    """
    weights = _weights(source)
    if foreign := sorted(name for name in weights if not name.startswith(("model.", "lm_head."))):
        holder = (source.name or source.folder) if isinstance(source, Checkpoint) else "The model"
        raise ValueError(
            f"{holder} holds {foreign[0]:.100}, and is no causal language model, by whose weights a base is known. "
            "Take a folder of the language model: models with other heads are loaded from it, too."
        )
    digests = {}
    for name, weight in weights.items():
        if not is_memory_weight(name) and not name.endswith(LEGACY_BUFFER):
            weight = source.read(name) if isinstance(source, Checkpoint) else weight
            _require_plain(name, weight)
            # One look at both, which may be the same.
            elements = some_elements(weight, name in (EMBEDDINGS, HEAD))
            elements = elements.to("cpu", dtype or weight.dtype).to(torch.bfloat16).reshape(-1)
            content = hashlib.sha256(str(tuple(weight.shape)).encode())
            content.update(elements.view(torch.uint8).numpy().data)
            digests[name] = content.hexdigest()
    if digests.get(HEAD) == digests.get(EMBEDDINGS):
        digests.pop(HEAD, None)
    return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()


def in_float16(source: Checkpoint | nn.Module) -> bool:
    """Whether weights of the base are in float16, where small ones are others than in float32 and bfloat16."""
    return any(
        weight.dtype == torch.float16 for name, weight in _weights(source).items() if not is_memory_weight(name)
    )


def _weights(source: Checkpoint | nn.Module) -> Mapping[str, torch.Tensor]:
    """Those of a checkpoint have shapes and dtypes alone."""
    return source.shapes if isinstance(source, Checkpoint) else source.state_dict()


def _require_plain(name: str, weight: torch.Tensor) -> None:
    if isinstance(weight, DTensor):
        raise ValueError(f"{name} is sharded over processes. Save the model, and name its folder.")
    if weight.is_meta:
        raise ValueError(f"{name} is not in memory (offloaded, or on the meta device). Name the model's folder.")
    if hasattr(weight, "__tensor_flatten__"):
        raise ValueError(f"{name} is quantized: whether it is the base's cannot be seen. Take the unquantized model.")
    require_float(name, weight)
