"""Retrofits pretrained models with a compressive memory and head gates."""

import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import logging

from modeling_infini import InfiniConfig, InfiniForCausalLM, model_card

from .architectures import infini_config, require_supported
from .checkpoints import Checkpoint, Weights, new_folder, require_free, saved_dtype, write_weights


logger = logging.get_logger(__name__)

# Buffers that old Llama checkpoints hold beside their weights.
LEGACY_BUFFER = "rotary_emb.inv_freq"

HeadGates = str | os.PathLike | Sequence[float | Sequence[float]]


def convert_to_infini(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    segment_length: int | None = None,
    local_attention: Literal["segment", "sliding"] = "sliding",
    num_sink_tokens: int | None = None,
    head_gate_init_value: float = 4.0,
    head_gates: HeadGates | None = None,
    use_mem_delta_rule: bool = False,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
    allow_bin: bool = False,
    revision: str | None = None,
) -> Path:
    """
    Converts a Llama, Mistral, Qwen2 or Qwen3 checkpoint to an Infini-attention one. Up to `segment_length` tokens, the
    converted model's logits equal the source's; beyond, it reads on with local attention and a memory, whose use is
    learned in fine-tuning.

    Weights go from file to file; no more than one output shard is held in memory, except for a GGUF source, which is
    dequantized as a whole.

    Args:
        source: a folder with a checkpoint, a `.gguf` file, or the id of a model on the Hub.
        output: the folder to make. It must not exist, or be empty; it appears only when it is complete.
        segment_length: tokens per segment, N; may be left out where the source has a sliding window of its own.
        local_attention: `"sliding"` sees the last N tokens and the sinks; `"segment"` those of the token's own
            segment, which costs an untrained model more.
        num_sink_tokens: attention sinks of `"sliding"`; by default 4 there, but 0 where the source slides itself, and
            0 in `"segment"`.
        head_gate_init_value: logit of the gates, whose sigmoid is the share of local attention. By default 4.0, 98 %
            local: the memory is not trained yet. Fine-tuning may want 0.0, since gates that start closed stay closed.
        head_gates: logits per layer or per head instead: a list with a number, or a list of one number per head, for
            each layer; or the path of a JSON file that holds it.
        use_mem_delta_rule: write the memory with the delta rule.
        dtype: of the saved weights; `"auto"` keeps each weight's own. Gates are always in float32.
        max_shard_size: of an output file, in bytes or as in `"5GB"`.
        allow_bin: read PyTorch `.bin` files where there are no safetensors.
        revision: of a model on the Hub.

    Returns:
        The output folder: weights, configuration, generation configuration, tokenizer, code files for
        `trust_remote_code=True`, and a model card.

    Raises:
        FileExistsError: if `output` holds something.
        FileNotFoundError: if `source` is no checkpoint.
        ValueError: if the source is not supported or incomplete, or the window does not fit into the positions that it
            was trained on.
    """
    weight_dtype = saved_dtype(dtype)
    require_free(output)
    checkpoint = Checkpoint(source, revision, allow_bin)
    require_supported(checkpoint.config_fields)
    config = infini_config(
        checkpoint.config,
        segment_length=segment_length,
        local_attention=local_attention,
        num_sink_tokens=num_sink_tokens,
        origin=_origin(checkpoint),
        head_gate_init_value=head_gate_init_value,
        use_mem_delta_rule=use_mem_delta_rule,
    )
    gates = _gate_logits(config, head_gates) / config.head_gate_scale
    shapes, weights = _output_weights(checkpoint, config, gates, weight_dtype)
    config.architectures = [InfiniForCausalLM.__name__]
    config.dtype = weight_dtype or checkpoint.config.dtype or shapes["model.embed_tokens.weight"].dtype

    with new_folder(output) as folder:
        write_weights(folder, shapes, weights, max_shard_size)
        save_tokenizer(checkpoint, folder, VERY_LARGE_INTEGER)
        generation_config = checkpoint.generation_config()
        # A limit on prompt and answer together would refuse a book.
        generation_config.max_length = None
        generation_config.save_pretrained(folder)
        model_card(config, torch.sigmoid(gates * config.head_gate_scale)).save(folder / "README.md")
        for file in checkpoint.folder.glob("LICENSE*"):
            shutil.copy(file, folder)
        # Last, since without it nothing loads.
        config.save_pretrained(folder)
    return Path(output).absolute()


def _origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """Name, revision and licence of the source, as far as they are known."""
    origin = {"name": checkpoint.name, "revision": checkpoint.revision}
    card = checkpoint.folder / "README.md"
    if card.is_file():
        data = ModelCard.load(card, ignore_metadata_errors=True).data
        origin |= {"license": data.license, "license_name": data.license_name, "license_link": data.license_link}
    return {name: value for name, value in origin.items() if value is not None}


def _gate_logits(config: InfiniConfig, head_gates: HeadGates | None) -> torch.Tensor:
    """`(layers, heads)`, float32."""
    shape = (config.num_hidden_layers, config.num_attention_heads)
    if head_gates is None:
        return torch.full(shape, float(config.head_gate_init_value))
    where = "head_gates"
    layers: Any = head_gates
    form = f"a list of {shape[0]} layers, each a number or a list of {shape[1]} numbers, one per head"
    try:
        if isinstance(head_gates, (str, os.PathLike)):
            where = os.fspath(head_gates)
            layers = json.loads(Path(head_gates).read_text(encoding="utf-8"))
        if len(layers) != shape[0]:
            raise ValueError(f"it has {len(layers)} layers")
        logits = torch.stack([torch.tensor(layer, dtype=torch.float32).expand(shape[1]) for layer in layers])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} must hold the logits of the gates as {form}: {error}.") from error
    if not logits.isfinite().all():
        raise ValueError(f"{where} holds a logit that is not finite.")
    return logits


def _output_weights(
    checkpoint: Checkpoint, config: InfiniConfig, gates: torch.Tensor, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], Weights]:
    """Shapes and readers of the weights to write, in the order of the model; `config` learns if heads are untied."""
    with torch.device("meta"):
        expected = dict(InfiniForCausalLM(config).state_dict())
    found = {name: shape for name, shape in checkpoint.shapes.items() if not name.endswith(LEGACY_BUFFER)}
    if config.tie_word_embeddings:
        if _has_own_head(checkpoint):
            # What transformers does with such a checkpoint.
            logger.warning("The source ties its embeddings, but has a head of its own: the output does not tie them.")
            config.tie_word_embeddings = False
        else:
            found.pop("lm_head.weight", None)
            del expected["lm_head.weight"]

    shapes: dict[str, torch.Tensor] = {}
    weights: Weights = {}
    for name, shape in expected.items():
        if name.endswith("head_gates.weight"):
            layer = int(name.split(".")[2])
            shapes[name] = torch.empty(shape.shape, dtype=torch.float32, device="meta")
            weights[name] = gates[layer].clone
        elif name in found and found[name].shape == shape.shape:
            source = found.pop(name)
            shapes[name] = source if dtype is None else source.to(dtype)
            weights[name] = partial(checkpoint.read, name)
    if missing := sorted(set(expected) - set(shapes)):
        raise ValueError(
            f"The checkpoint is incomplete: {len(missing)} weights are missing or of another shape, such as "
            f"{missing[0]}. It must be that of a whole causal language model."
        )
    if found:
        raise ValueError(
            f"The checkpoint has {len(found)} weights that a {config.converted_from['model_type']} has not, such as "
            f"{min(found)}. They would be lost."
        )
    return shapes, weights


def _has_own_head(checkpoint: Checkpoint) -> bool:
    names = ("lm_head.weight", "model.embed_tokens.weight")
    return checkpoint.shapes.keys() >= set(names) and not torch.equal(*map(checkpoint.read, names))


def save_tokenizer(checkpoint: Checkpoint, folder: Path, model_max_length: int) -> None:
    """Saves the source's tokenizer, if it has one that loads, with another limit."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint.folder, **checkpoint.options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        logger.warning("The source has no tokenizer that loads; the output has none. (%s)", reason)
        return
    tokenizer.model_max_length = model_max_length
    tokenizer.save_pretrained(folder)
