"""Puts a memory into a conversion that is there already: whole or not at all, with the base's weights as they are."""

import os
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_infini import InfiniConfig
from modeling_infini.configuration_infini import code_files, copy_whole
from modeling_infini.modeling_infini import FORMER_NAMES

from .architectures import MEMORY_OPTIONS, require_known_distances
from .checkpoints import (
    MEMORY_SHARD,
    WEIGHTS_FIELD,
    Checkpoint,
    indexed_files,
    is_memory_weight,
    named_full_disk,
    read_json,
    write_index,
    write_json,
)
from .memory_weights import MemoryWeights, at_least_float32, initial_memory_weights, memory_shapes, require_fitting
from .small_files import generation_fields, refused_generation_fields


# Files that this module has written, by their names.
OWN_FILES = re.compile(r"model-(memory-|\d{5}-)?[0-9a-f]{8}\.safetensors(\.index\.json)?")


def apply_memory(folder: str | os.PathLike, memory: str | os.PathLike | MemoryWeights) -> None:
    """
    Puts a memory into a conversion of its base, in place. See [`replace_memory`] for what that leaves as it is.

    Args:
        folder: an Infini-attention checkpoint on this machine.
        memory: a folder that `save_memory` made, or its id on the Hub.

    Raises:
        ValueError: if the conversion is one of another base, or not as it was converted; nothing is changed then.
    """
    memory = memory if isinstance(memory, MemoryWeights) else MemoryWeights.load(memory)
    checkpoint = Checkpoint(folder)
    memory.require_base(checkpoint, checkpoint.infini_config, str(folder))
    replace_memory(folder, memory.weights, memory.options, applied=memory.as_origin)


def replace_memory(
    folder: str | os.PathLike,
    weights: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any] = MappingProxyType({}),
    *,
    applied: dict[str, str] | None = None,
) -> None:
    """
    Gives a conversion other weights of its memory, and other fields, in place. Whenever that ends, also by a kill,
    the folder holds the old model or the new one: what counts is which files config.json names.

    The base's weights stay byte for byte, in the same files, but for those that are in one file with weights of the
    memory, or in the one file of a model without: after the first call none is. What `generate()` cannot follow with
    fewer tokens in a segment is left out of generation_config.json, and kept in `converted_from`.

    Args:
        folder: an Infini-attention checkpoint on this machine.
        weights: by their names in the model. Others stay as they are if they have the same shape, and else start anew.
        fields: of [`InfiniConfig`], of those that a memory brings.
        applied: which published memory it is, for `converted_from`; `None`: none.

    Raises:
        ValueError: if a field or a weight does not fit; nothing is changed then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: what is on the Hub is downloaded first.")
    checkpoint = Checkpoint(folder)
    config = _with_fields(checkpoint.infini_config, fields)
    origin = {name: value for name, value in (config.converted_from or {}).items() if name != "memory"}
    generation = generation_fields(checkpoint)
    if refused := refused_generation_fields(generation, config, former=checkpoint.infini_config):
        origin["generation_config"] = origin.get("generation_config", {}) | refused
    config.converted_from = origin | ({} if applied is None else {"memory": applied}) or None
    memory = _complete(checkpoint, config, weights)
    former = {SAFE_WEIGHTS_NAME, *checkpoint.safetensors}
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        # Not the same where an earlier call was killed.
        former |= set(indexed_files(folder / SAFE_WEIGHTS_INDEX_NAME))

    token = uuid4().hex[:8]
    try:
        with named_full_disk(folder):
            files = _write_files(checkpoint, memory, token)
    except BaseException:
        for file in folder.glob(f"model-*{token}.safetensors"):
            file.unlink()
        raise
    sizes = [weight.nbytes for name, weight in memory.items()]
    sizes += [shape.nbytes for name, shape in checkpoint.shapes.items() if not is_memory_weight(name)]
    index = f"model-{token}.safetensors.index.json"
    write_index(folder / index, files, sum(sizes))
    with TemporaryDirectory(dir=folder, prefix=".") as hidden:
        # The code first: that of an older version may not know the fields.
        config.save_pretrained(hidden)
        for file in code_files(Path(hidden)):
            copy_whole(file, folder)
        final = read_json(Path(hidden) / CONFIG_NAME)
        if refused:
            # Before the switch: the old model does without, and the new one cannot do with them.
            kept = {name: value for name, value in generation.items() if name not in refused}
            write_json(Path(hidden) / GENERATION_CONFIG_NAME, kept)
            os.replace(Path(hidden) / GENERATION_CONFIG_NAME, folder / GENERATION_CONFIG_NAME)
        switched = Path(hidden) / "switched.json"
        write_json(switched, final | {WEIGHTS_FIELD: index})
        os.replace(switched, folder / CONFIG_NAME)
        # From here on, it is the new model; the rest leads back to the usual names.
        _remove_others(folder, former, {index, *files.values()})
        write_index(Path(hidden) / SAFE_WEIGHTS_INDEX_NAME, files, sum(sizes))
        os.replace(Path(hidden) / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_INDEX_NAME)
        os.replace(Path(hidden) / CONFIG_NAME, folder / CONFIG_NAME)
    (folder / index).unlink()


def _with_fields(config: InfiniConfig, fields: Mapping[str, Any]) -> InfiniConfig:
    """A copy with other fields."""
    if foreign := sorted(set(fields) - set(MEMORY_OPTIONS)):
        raise ValueError(f"{foreign[0]} is no field that a memory brings; those are {', '.join(MEMORY_OPTIONS)}.")
    try:
        changed = InfiniConfig.from_dict({**deepcopy(config.to_dict()), **fields})
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    require_known_distances(changed)
    return changed


def _complete(
    checkpoint: Checkpoint, config: InfiniConfig, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All weights of the memory, in the model's order."""
    shapes = memory_shapes(config)
    require_fitting(weights, shapes, "the memory")
    complete = {}
    for layer in range(config.num_hidden_layers):
        for name, weight in initial_memory_weights(config, layer).items():
            here = checkpoint.shapes.get(name)
            if name in weights:
                weight = weights[name]
            elif here is not None and here.shape == weight.shape:
                weight = checkpoint.read(name)
            complete[name] = at_least_float32(weight)
    return complete


def _write_files(checkpoint: Checkpoint, memory: dict[str, torch.Tensor], token: str) -> dict[str, str]:
    """
    Writes the memory, and anew what was in one file with a memory, or in the one file of a model without.

    Returns:
        The file of each weight.
    """
    file_of: dict[str, str] = {}
    for number, file in enumerate(checkpoint.safetensors, 1):
        with safe_open(checkpoint.folder / file, "pt") as content:
            metadata, names = content.metadata(), list(content.keys())
            of_base = [name for name in names if not is_memory_weight(FORMER_NAMES.rename_source_key(name)[0])]
            # By that name, it would be read instead of the index beside it.
            is_read_alone = bool(memory) and file == SAFE_WEIGHTS_NAME
            if of_base and (len(of_base) < len(names) or is_read_alone):
                file = f"model-{number:05}-{token}.safetensors"
                save_file({name: content.get_tensor(name) for name in of_base}, checkpoint.folder / file, metadata)
        file_of |= dict.fromkeys(of_base, file)
    if memory:
        file = MEMORY_SHARD.format(f"-{token}")
        save_file(memory, checkpoint.folder / file, {"format": "pt"})
        file_of |= dict.fromkeys(memory, file)
    return file_of


def _remove_others(folder: Path, former: set[str], used: set[str]) -> None:
    """Removes the former files that are used no longer, and what calls that were killed have left."""
    left = {file.name for file in folder.iterdir() if OWN_FILES.fullmatch(file.name)}
    for name in (former | left) - used:
        (folder / name).unlink(missing_ok=True)
