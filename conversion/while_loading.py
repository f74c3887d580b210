"""A base that is given to `from_pretrained` of our classes: converted on its way into the model, never written."""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from modeling_infini import InfiniConfig, InfiniPreTrainedModel

from .architectures import FILE_FIELDS, MEMORY_OPTIONS, RETURN_FIELDS, WINDOW_FIELDS, infini_config, require_supported
from .checkpoints import MEMORY_WEIGHT, Checkpoint, cast, saved_dtype
from .memory_weights import initial_memory_weights
from .to_infini import Conversion, source_origin


logger = logging.get_logger(__name__)

# Of huggingface_hub.
DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "token")

# Arguments of `convert_to_infini` that are no fields of a configuration, and what takes their place here.
OF_CONVERSIONS = {
    "memory": "infini_transformers.conversion.load_memory(model, ...) puts a memory into the model that is loaded",
    "head_gates": "convert_to_infini writes a checkpoint with gates of its own",
    "transfer": "convert_to_infini writes a checkpoint whose memory is taught",
    "max_shard_size": "save_pretrained takes it",
    "allow_bin": "use_safetensors=True refuses .bin files",
    "variant": "rename model.<variant>.safetensors to model.safetensors in a copy of the folder",
}

# What starts from random weights, by a seed of each layer's.
RANDOM_OPTIONS = ("memory_write_gate", "learned_delta_update")
# What adds linear layers, which are quantized with the others, and need weights for that.
LINEAR_OPTIONS = (*RANDOM_OPTIONS, "token_gates", "num_memory_slots")


def load_base(
    model_class: type[InfiniPreTrainedModel],
    load: Callable[..., Any],
    source: str | os.PathLike,
    model_args: Sequence[Any],
    config: PreTrainedConfig | str | os.PathLike | None,
    kwargs: dict[str, Any],
) -> InfiniPreTrainedModel | tuple[InfiniPreTrainedModel, dict[str, Any]]:
    """
    The model that `from_pretrained` would make of a conversion of the source, with the same configuration.

    Args:
        load: `from_pretrained` of transformers.
        config: of the base, or an [`InfiniConfig`], which then decides; `None`: that of the source.
        kwargs: of `from_pretrained`; also fields of the memory, as a conversion takes them, and of the base.

    Raises:
        TypeError: for arguments that mean nothing here.
        FileNotFoundError, ValueError: as `convert_to_infini`.
    """
    for name in OF_CONVERSIONS:
        given_value = kwargs.pop(name, None)
        if given_value is not None and given_value is not False:
            raise TypeError(f"{name}= is not for a base that is converted while it is loaded: {OF_CONVERSIONS[name]}.")
    returns_info = kwargs.pop("output_loading_info", False)
    options = {name: kwargs.pop(name) for name in MEMORY_OPTIONS if name in kwargs}
    checkpoint = _checkpoint(source, kwargs)
    require_supported(checkpoint.config_fields)
    base: Any = (
        config if config is None or isinstance(config, PreTrainedConfig) else AutoConfig.from_pretrained(config)
    )
    given = base if base is not None and base.model_type == InfiniConfig.model_type else None
    if given is not None:
        options = {name: getattr(given, name) for name in MEMORY_OPTIONS} | options
    elif base is not None:
        require_supported(base.to_dict())
        if base.model_type != checkpoint.config.model_type:
            raise ValueError(f"config is of a {base.model_type}, and {source} a {checkpoint.config.model_type}.")
        checkpoint.config = deepcopy(base)
    own_fields = _take_fields(checkpoint.config, kwargs)

    made: Any = infini_config(checkpoint.config, origin=source_origin(checkpoint), **options)
    if given is not None:
        made = _as_given(given, made, options)
    for name, value in own_fields.items():
        if getattr(made, name) != value:
            setattr(made, name, value)
    dtype = next((kwargs[name] for name in ("dtype", "torch_dtype") if kwargs.get(name) is not None), "auto")
    conversion = Conversion.of(checkpoint, made, saved_dtype(dtype))
    if saved_dtype(dtype) == torch.float16:
        # A conversion looks at what float16 does to a weight as it writes it; here nothing else would.
        for name, read in conversion.weights.items():
            cast(name, read(), torch.float16)
    if kwargs.get("quantization_config") is not None and any(getattr(made, name) for name in LINEAR_OPTIONS):
        raise ValueError(
            "A base with linear layers of the memory cannot be quantized while it is converted: they have no weights "
            "yet. Convert it by convert_to_infini, and load that."
        )

    if not isinstance(made, model_class.config_class):
        # That of remote code.
        made = model_class.config_class.from_dict(made.to_dict())
    if base is not None and base._attn_implementation is not None:
        kwargs.setdefault("attn_implementation", base._attn_implementation)
    made._new_weights = MEMORY_WEIGHT
    kwargs.setdefault("generation_config", GenerationConfig.from_dict(conversion.generation))
    logger.warning(
        "%s is a %s: it is converted while it is loaded, with segment_length=%d and %.0f %% of local attention in its "
        "gates. Its memory is not taught yet; convert_to_infini(..., transfer=texts) or a training does that.",
        source,
        checkpoint.config.model_type,
        made.segment_length,
        100 * torch.tensor(float(made.head_gate_init_value)).sigmoid().item(),
    )
    folder: Path | None = checkpoint.folder
    if checkpoint.gguf is not None:
        folder, kwargs["state_dict"] = None, {name: read() for name, read in conversion.weights.items()}
    model, info = load(folder, *model_args, config=made, output_loading_info=True, **kwargs)
    # By the base's name an adapter of this model, or a trainer's reference, would be loaded on the base itself.
    model.name_or_path = model.config.name_or_path = ""
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError(
            "device_map leaves layers on the disk, where their memory has no weights yet. Convert the base by "
            "convert_to_infini, and load that."
        )
    if any(getattr(made, name) for name in RANDOM_OPTIONS):
        _start_memory(model, made)
    return (model, info) if returns_info else model


def _checkpoint(source: str | os.PathLike, kwargs: dict[str, Any]) -> Checkpoint:
    """The source's files; takes from `kwargs` what says where they are."""
    download = {name: value for name in DOWNLOAD if (value := kwargs.pop(name, None))}
    subfolder, gguf_file = (kwargs.pop(name, None) or "" for name in ("subfolder", "gguf_file"))
    revision = kwargs.pop("revision", None)
    # Where it does not exist, `Checkpoint` says so.
    if Path(source).exists():
        source, revision = Path(source, subfolder, gguf_file), None
    elif subfolder or gguf_file:
        raise ValueError(
            f"{subfolder or gguf_file} of {source} on the Hub cannot be converted while it is loaded. Download it, "
            "and name the folder or the .gguf file."
        )
    use_safetensors = kwargs.get("use_safetensors")
    checkpoint = Checkpoint(source, revision, use_safetensors is not True, **download)
    if use_safetensors is False and checkpoint.safetensors:
        raise ValueError("use_safetensors=False: a base that has safetensors is converted from these. Leave it out.")
    return checkpoint


def _take_fields(source: PreTrainedConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the base's fields from `kwargs` and changes them in `source`; returns those that a conversion has too."""
    known = {*source.to_dict(), "num_labels", "output_attentions"} - set(FILE_FIELDS)
    given = {name: kwargs.pop(name) for name in known & set(kwargs)}
    for name, value in given.items():
        # What is kept for the way back is the source's own.
        if name in WINDOW_FIELDS or name not in RETURN_FIELDS:
            setattr(source, name, value)
    return {name: value for name, value in given.items() if name not in WINDOW_FIELDS}


def _as_given(given: Any, expected: InfiniConfig, options: dict[str, Any]) -> InfiniConfig:
    """A configuration of ours that was given, which decides; a warning names what a conversion has otherwise."""
    fields, of_conversion = given.to_dict() | options, expected.to_dict()
    ignored = {*FILE_FIELDS, "converted_from", "_name_or_path"}
    if differing := sorted(n for n, v in of_conversion.items() if n not in ignored and fields.get(n) != v):
        logger.warning("The configuration given has other fields than the source's: %s. It counts.", differing)
    # Validated as a whole.
    InfiniConfig.from_dict(fields)
    changed = deepcopy(given)
    for name, value in options.items():
        setattr(changed, name, value)
    changed.converted_from = expected.converted_from
    return changed


@torch.no_grad()
def _start_memory(model: InfiniPreTrainedModel, config: InfiniConfig) -> None:
    """Gives the memory the weights that it has in a conversion, where those are random."""
    parameters = {name if name.startswith("model.") else f"model.{name}": of for name, of in model.named_parameters()}
    for layer in range(config.num_hidden_layers):
        for name, weight in initial_memory_weights(config, layer).items():
            parameter = parameters[name]
            weight = weight.to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
            parameter.copy_(weight)
