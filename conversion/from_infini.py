"""Takes Infini-attention out of a model again."""

import os
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_infini import InfiniConfig

from .architectures import base_config
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
from .memory_weights import at_least_float32, first_change, memory_digest
from .small_files import (
    copy_files,
    load_tokenizer,
    restored_generation_fields,
    restored_settings,
    write_fields,
    write_tokenizer,
)
from .to_infini import own_weights
from .wrong_sources import what_weights_they_are


def convert_from_infini(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    drop_gates: bool = False,
    model_type: str | None = None,
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
    revision: str | None = None,
) -> Path:
    """
    Converts an Infini-attention checkpoint to its base architecture: full attention, no memory. After
    `convert_to_infini` the weights are those of the source, byte for byte; so are the files that it copied. The
    settings of the tokenizer and of generation are the source's again.

    Args:
        source: a folder with a checkpoint, or the id of a model on the Hub.
        output: the folder to make. It must not exist, or be empty; it appears only when it is complete.
        drop_gates: drop gates, and what else a memory learns, although they differ from their initial value. The
            base architecture has no place for them: what the model learned to do with its memory is lost. A memory
            that was applied (`apply_memory`, `convert_to_infini(..., memory=...)`) and not trained since needs none of
            this: it is published by itself.
        model_type: `"llama"`, `"mistral"`, `"qwen2"` or `"qwen3"`; by default what the model was converted from, or
            else the first of them that has its parameters. All have full attention, but for a Mistral's own window.
        dtype: of the saved weights; `"auto"` keeps each weight's own.
        max_shard_size: of an output file, in bytes or as in `"5GB"`.
        revision: of a model on the Hub.

    Returns:
        The output folder.

    Raises:
        FileExistsError: if `output` holds something.
        OSError: if the disk cannot hold the weights. Nothing is written then.
        ValueError: if the source is no Infini-attention model, no base architecture has its parameters, trained gates
            would be lost, a weight does not fit into `dtype`, or the base's tokenizer would give other ids.
    """
    weight_dtype, largest_file = saved_dtype(dtype), shard_size(max_shard_size)
    require_free(output)
    checkpoint = Checkpoint(source, revision)
    infini = checkpoint.infini_config
    config = base_config(infini, model_type)
    if not drop_gates:
        _require_no_loss(checkpoint, infini)

    found_names = {name for name in own_weights(checkpoint, config) if not is_memory_weight(name)}
    with torch.device("meta"):
        expected = dict(AutoModelForCausalLM.from_config(config).state_dict())
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    if found_names != set(expected):
        names = sorted(found_names ^ set(expected))
        raise ValueError(
            f"The checkpoint is not that of a whole causal language model: {len(names)} weights are missing or not of "
            f"a {config.model_type}, such as {names[0]}.{what_weights_they_are(found_names)}"
        )
    shapes = {name: checkpoint.shapes[name] for name in expected}
    for name, shape in shapes.items():
        require_float(name, shape)
        if shape.shape != expected[name].shape:
            shapes_of = tuple(shape.shape), tuple(expected[name].shape)
            raise ValueError("{} is of the shape {}, but by its configuration of {}.".format(name, *shapes_of))
    if weight_dtype is not None:
        shapes = {name: shape.to(weight_dtype) for name, shape in shapes.items()}
    weights: Weights = {name: partial(checkpoint.read, name) for name in expected}
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = weight_dtype or infini.dtype
    tokenizer = load_tokenizer(checkpoint)

    require_room(output, shapes)
    with new_folder(output) as folder:
        copy_files(checkpoint, folder, back=True)
        settings = restored_settings(checkpoint, config.max_position_embeddings)
        write_tokenizer(checkpoint, folder, settings, tokenizer, config)
        write_fields(checkpoint, folder / "generation_config.json", restored_generation_fields(checkpoint))
        write_weights(folder, shapes, weights, largest_file)
        config.save_pretrained(folder)
    return Path(output).absolute()


def _require_no_loss(checkpoint: Checkpoint, config: InfiniConfig) -> None:
    """Passes a memory as it starts, and one that was applied and is published by itself."""
    names = [name for name in checkpoint.shapes if is_memory_weight(name)]
    applied = (config.converted_from or {}).get("memory")
    weights = {name: at_least_float32(checkpoint.read(name)) for name in names} if applied else {}
    if applied and memory_digest(weights) == applied.get("sha256"):
        return
    if (name := first_change(names, checkpoint.read, config)) is not None:
        raise ValueError(
            f"The memory was trained or set: {name} differs from its initial value. The base "
            "architecture has no place for it. Save it by itself (infini save-memory), or lose it: "
            "pass drop_gates=True (--drop-gates) to drop it."
        )
