"""Retrofits pretrained models with a compressive memory and head gates."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging
from yaml import YAMLError

from modeling_infini import InfiniConfig, InfiniForCausalLM

from .architectures import MEMORY_OPTIONS, infini_config, require_supported
from .base_fingerprint import EMBEDDINGS, HEAD, LEGACY_BUFFER, base_fingerprint
from .checkpoints import (
    Checkpoint,
    Weights,
    is_memory_weight,
    new_folder,
    require_float,
    require_free,
    require_room,
    saved_dtype,
    shard_size,
    write_weights,
)
from .memory_weights import MemoryWeights, initial_memory_weights, memory_shapes
from .model_card import model_card
from .small_files import (
    CARD,
    convert_gguf_tokenizer,
    converted_settings,
    copy_files,
    generation_fields,
    leading_bos,
    load_tokenizer,
    refused_generation_fields,
    replaced_settings,
    write_fields,
    write_tokenizer,
)
from .transfer import FIELDS, require_texts
from .transfer import transfer as attention_transfer
from .wrong_sources import what_weights_they_are


logger = logging.get_logger(__name__)

LICENSE_FIELDS = ("license", "license_name", "license_link")

HeadGates = str | os.PathLike | Sequence[float | Sequence[float]]


def convert_to_infini(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    segment_length: int | None = None,
    local_attention: Literal["segment", "sliding"] | None = None,
    num_sink_tokens: int | None = None,
    head_gate_init_value: float | None = None,
    head_gates: HeadGates | None = None,
    use_mem_delta_rule: bool | None = None,
    memory_norm_init_scale: float | None = None,
    num_memory_slots: int | None = None,
    memory: str | os.PathLike | MemoryWeights | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
    allow_bin: bool = False,
    revision: str | None = None,
    transfer: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    **options: Any,
) -> Path:
    """
    Converts a Llama, Mistral, Qwen2 or Qwen3 checkpoint to an Infini-attention one. Up to `segment_length` tokens, the
    converted model's logits equal the source's; beyond, it reads on with local attention and a memory, whose use is
    learned in fine-tuning.

    Weights go from file to file; no more than one output shard is held in memory. A GGUF source is dequantized weight
    by weight.

    Args:
        source: a folder with a checkpoint, a `.gguf` file, or the id of a model on the Hub.
        output: the folder to make. It must not exist, or be empty; it appears only when it is complete.
        segment_length: tokens per segment, N; may be left out where the source has a sliding window of its own.
        local_attention: `"sliding"`, the default, sees the last N tokens and the sinks; `"segment"` those of the
            token's own segment, which costs an untrained model more.
        num_sink_tokens: attention sinks of `"sliding"`; by default 4 there, but 0 where the source slides itself, and
            0 in `"segment"`.
        head_gate_init_value: logit of the gates, whose sigmoid is the share of local attention. By default 4.0, 98 %
            local: the memory is not trained yet. Fine-tuning may want 0.0, since gates that start closed stay closed.
        head_gates: logits per layer or per head instead: a list with a number, or a list of one number per head, for
            each layer; or the path of a JSON file that holds it.
        use_mem_delta_rule: write the memory with the delta rule.
        memory_norm_init_scale: norm the queries and keys of the memory, by heads with learned scales that start here.
        num_memory_slots: tokens whose exact keys and values a layer keeps. `transfer` teaches which ones, and leaves
            the slots to the layers that look far; before, each layer keeps the latest.
        memory: a memory that was trained on this base, as `save_memory` has saved it: its folder, or its id on the
            Hub. The fields of the memory are its own; options that contradict it are refused.
        dtype: of the saved weights; `"auto"` keeps each weight's own. Gates are always in float32.
        max_shard_size: of an output file, in bytes or as in `"5GB"`.
        allow_bin: read PyTorch `.bin` files where there are no safetensors.
        revision: of a model on the Hub.
        transfer: texts by which the memory is taught at once, see [`transfer`]; if that is interrupted, the conversion
            stands, and `transfer` goes on. Texts that are too short leave no output.
        options: other fields of the memory in [`InfiniConfig`], such as `memory_feature_map`, `token_gates` or
            `memory_layers`. What they add starts as in a new model.

    Returns:
        The output folder: weights, configuration, generation configuration, tokenizer, code files for
        `trust_remote_code=True`, a model card, and the other small files of the source, its card as README.source.md.

    Raises:
        FileExistsError: if `output` holds something.
        OSError: if the disk cannot hold the weights. Nothing is written then.
        FileNotFoundError: if `source` is no checkpoint.
        ValueError: if the source is not supported or incomplete, its tokenizer would give other ids, the window does
            not fit into the positions that it was trained on, a weight does not fit into `dtype`, or the memory
            belongs to another base.
    """
    options |= {
        "segment_length": segment_length,
        "local_attention": local_attention,
        "num_sink_tokens": num_sink_tokens,
        "head_gate_init_value": head_gate_init_value,
        "use_mem_delta_rule": use_mem_delta_rule,
        "memory_norm_init_scale": memory_norm_init_scale,
        "num_memory_slots": num_memory_slots,
    }
    if foreign := sorted(set(options) - set(MEMORY_OPTIONS)):
        raise TypeError(f"convert_to_infini has no argument {foreign[0]}, and a memory no such field.")
    if transfer is not None:
        if memory is not None or head_gates is not None:
            raise ValueError(
                "transfer teaches memory and gates anew. Leave out either transfer, or memory and head_gates."
            )
        own = FIELDS | dict.fromkeys(("memory_layers", "slot_layers", "head_gate_init_value"))
        if chosen := [name for name in own if options.get(name) not in (None, own[name])]:
            raise ValueError(
                f"transfer decides on {chosen[0]} itself, and finds the layers that a memory helps. Leave out either "
                f"transfer or {chosen[0]}."
            )
        transfer = [transfer] if isinstance(transfer, (str, os.PathLike)) else transfer
        if absent := [path for path in transfer if not Path(path).exists()]:
            raise FileNotFoundError(f"There is no file or folder {absent[0]}.")
    if memory is not None:
        memory = memory if isinstance(memory, MemoryWeights) else MemoryWeights.load(memory)
        options = _options_of(memory, options, head_gates)
    weight_dtype, largest_file = saved_dtype(dtype), shard_size(max_shard_size)
    require_free(output)
    checkpoint = Checkpoint(source, revision, allow_bin)
    require_supported(checkpoint.config_fields)
    origin = source_origin(checkpoint, head_gates, memory)
    if memory is not None:
        # Before its layers are looked up, which a base of another size may not have.
        in_all = dict.fromkeys(("memory_layers", "slot_layers"))
        memory.require_base(
            checkpoint, infini_config(checkpoint.config, origin=origin, **options | in_all), str(source)
        )
    config = infini_config(checkpoint.config, origin=origin, **options)
    conversion = Conversion.of(checkpoint, config, weight_dtype)
    if transfer is not None and conversion.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer that can be loaded, by which transfer reads the texts.")
    if memory is None:
        gates = _gate_weights(config, head_gates)
        local_shares = torch.sigmoid(gates * config.head_gate_scale)
        of_memory = _new_memory(config, gates)
    else:
        local_shares = memory.local_shares
        of_memory = {name: weight.clone for name, weight in memory.weights.items()}

    require_room(output, conversion.shapes)
    with new_folder(output) as folder:
        copy_files(checkpoint, folder)
        if checkpoint.gguf is not None:
            convert_gguf_tokenizer(checkpoint, folder, conversion.tokenizer, config)
        else:
            write_tokenizer(checkpoint, folder, conversion.settings, conversion.tokenizer, config)
        write_fields(checkpoint, folder / "generation_config.json", conversion.generation)
        model_card(config, local_shares).save(folder / CARD)
        write_weights(folder, conversion.shapes, conversion.weights | of_memory, largest_file)
        # Last, since without it nothing loads.
        config.save_pretrained(folder)
        if transfer is not None:
            # Of no use later: the folder is there then.
            require_texts(folder, transfer)
    if transfer is not None:
        attention_transfer(output, transfer)
    return Path(output).absolute()


@dataclass
class Conversion:
    """
    What a base becomes, but for the weights of the memory.

    Attributes:
        config: of the converted model, complete.
        shapes: on the meta device, of the base's weights in the order of the model and of the memory's.
        weights: readers of the base's.
        tokenizer, settings: the source's tokenizer, and the settings that it gets.
        generation: the fields of its generation configuration that a memory can follow.
    """

    config: InfiniConfig
    shapes: dict[str, torch.Tensor]
    weights: Weights
    tokenizer: PreTrainedTokenizerBase | None
    settings: dict[str, Any]
    generation: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: InfiniConfig, dtype: torch.dtype | None) -> "Conversion":
        """
        Args:
            config: as [`infini_config`] gives it; it is completed.
            dtype: of the weights; `None`: each keeps its own.

        Raises:
            ValueError: if weights are missing, not used or quantized.
        """
        shapes, weights = _base_weights(checkpoint, config, dtype)
        origin = config.converted_from
        origin["fingerprint"] = base_fingerprint(checkpoint, dtype)
        config.architectures = [InfiniForCausalLM.__name__]
        config.dtype = dtype or checkpoint.config.dtype or shapes[EMBEDDINGS].dtype
        tokenizer = load_tokenizer(checkpoint)
        if (bos := leading_bos(tokenizer)) is not None:
            origin["starts_with"] = bos
        settings = converted_settings(checkpoint, tokenizer)
        if checkpoint.gguf is None:
            origin["tokenizer_config"] = replaced_settings(checkpoint, settings)
        generation = generation_fields(checkpoint)
        if refused := refused_generation_fields(generation, config):
            origin["generation_config"] = refused
        kept = {name: value for name, value in generation.items() if name not in refused}
        return cls(config, shapes, weights, tokenizer, settings, kept)


def _options_of(memory: MemoryWeights, given: dict[str, Any], head_gates: HeadGates | None) -> dict[str, Any]:
    """The fields of a memory. Raises ValueError if options that were given contradict them."""
    if head_gates is not None:
        raise ValueError("head_gates contradicts the memory, which brings its own gates. Leave one of them out.")
    fields = memory.config.memory_fields()
    for name, value in given.items():
        own = fields.get(name, getattr(memory.config, name))
        if value is not None and value != own:
            raise ValueError(
                f"{name}={value!r} contradicts the memory, which was trained with {name}={own!r:.100}. Leave it out."
            )
    return memory.options


def source_origin(
    checkpoint: Checkpoint, head_gates: HeadGates | None = None, memory: MemoryWeights | None = None
) -> dict[str, Any]:
    """Name, revision and licence of the source as far as they are known, and what the way back needs."""
    of_file: dict[str, Any] = {}
    if checkpoint.gguf is not None:
        # A memory is refused where its base has other weights: they may be known by its name.
        known = checkpoint.gguf.repository or (None if memory is None else memory.base.get("name"))
        of_file = {"name": known, "gguf": checkpoint.gguf.title, **checkpoint.gguf.licence}
    origin = {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        **(_licence_of_card(checkpoint.folder / CARD) if checkpoint.gguf is None else of_file),
        "head_gates": None if head_gates is None else "set by layer or head",
        "memory": None if memory is None else memory.as_origin,
    }
    # YAML has dates where JSON has none.
    return {name: json.loads(json.dumps(value, default=str)) for name, value in origin.items() if value is not None}


def _licence_of_card(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        logger.warning("The licence of the source is not known: the metadata of %s cannot be read. (%s)", card, reason)
        return {}
    return {name: getattr(data, name, None) for name in LICENSE_FIELDS}


def _gate_weights(config: InfiniConfig, head_gates: HeadGates | None) -> torch.Tensor:
    """`(layers, heads)`, float32."""
    shape = (config.num_hidden_layers, config.num_attention_heads)
    if head_gates is None:
        return torch.full(shape, config.head_gate_init_value / config.head_gate_scale, dtype=torch.float32)
    where = "head_gates"
    layers: Any = head_gates
    form = f"a list of {shape[0]} layers, each a number or a list of {shape[1]} numbers, one per head"
    try:
        if isinstance(head_gates, (str, os.PathLike)):
            where = os.fspath(head_gates)
            layers = json.loads(Path(head_gates).read_text(encoding="utf-8"))
        if len(layers) != shape[0]:
            raise ValueError(f"it has {len(layers)} layers")
        gates = torch.stack([_of_heads(torch.as_tensor(layer), shape[1]) for layer in layers]) / config.head_gate_scale
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} must hold the logits of the gates as {form}: {error}.") from error
    if not gates.isfinite().all():
        raise ValueError(f"{where} holds a logit that is not finite.")
    return gates


def _of_heads(logits: torch.Tensor, heads: int) -> torch.Tensor:
    if logits.dtype in (torch.bool, torch.complex64, torch.complex128) or logits.shape not in ((), (heads,)):
        raise ValueError(f"a layer has the shape {tuple(logits.shape)} and the dtype {logits.dtype}")
    return logits.float().expand(heads)


def _new_memory(config: InfiniConfig, gates: torch.Tensor) -> Weights:
    """Readers of a new memory's weights: those of its modules as they start, but for the gates `(layers, heads)`."""
    weights: Weights = {}
    for name in memory_shapes(config):
        layer = int(name.split(".")[2])
        weights[name] = partial(_initial_weight, config, layer, name)
        if name.endswith("head_gates.weight"):
            weights[name] = gates[layer].clone
    return weights


def _initial_weight(config: InfiniConfig, layer: int, name: str) -> torch.Tensor:
    return initial_memory_weights(config, layer)[name]


def _base_weights(
    checkpoint: Checkpoint, config: InfiniConfig, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], Weights]:
    """
    Shapes and readers of the base's weights, in the order of the model, and shapes of the memory's; `config` learns if
    heads are untied.
    """
    found = own_weights(checkpoint, config)
    found = {name: shape for name, shape in found.items() if not name.endswith(LEGACY_BUFFER)}
    with torch.device("meta"):
        expected = dict(InfiniForCausalLM(config).state_dict())
    if config.tie_word_embeddings:
        del expected[HEAD]

    shapes: dict[str, torch.Tensor] = {}
    weights: Weights = {}
    for name, shape in expected.items():
        if is_memory_weight(name):
            shapes[name] = torch.empty(shape.shape, dtype=torch.float32, device="meta")
        elif name in found and found[name].shape == shape.shape:
            source = found.pop(name)
            require_float(name, source)
            shapes[name] = source if dtype is None else source.to(dtype)
            weights[name] = partial(checkpoint.read, name)
    if missing := sorted(set(expected) - set(shapes)):
        name, here = missing[0], found.get(missing[0])
        asked = "" if here is None else f" ({tuple(here.shape)}; config.json says {tuple(expected[name].shape)})"
        raise ValueError(
            f"The checkpoint is incomplete: {len(missing)} weights are missing or of another shape, such as "
            f"{name}{asked}. It must be that of a whole causal language model.{what_weights_they_are(found)} If "
            "transformers loads it without a warning, save_pretrained of the loaded model makes one that is whole."
        )
    if found:
        raise ValueError(
            f"The checkpoint has {len(found)} weights that a {config.converted_from['model_type']} has not, such as "
            f"{min(found)}. They would be lost.{what_weights_they_are(found)}"
        )
    return shapes, weights


def own_weights(checkpoint: Checkpoint, config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """
    The shapes of a checkpoint's weights without a head that repeats tied embeddings. Where the head differs from
    them, `config` learns that they are not tied, which is what transformers does with such a checkpoint.
    """
    shapes = dict(checkpoint.shapes)
    if config.tie_word_embeddings and shapes.keys() >= {HEAD, EMBEDDINGS}:
        if torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDINGS)):
            del shapes[HEAD]
        else:
            logger.warning("%s ties its embeddings, but has a head of its own: they are not tied.", checkpoint.folder)
            config.tie_word_embeddings = False
    return shapes
