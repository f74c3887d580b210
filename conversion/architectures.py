"""The architectures that can be converted: what their configurations are in terms of InfiniConfig, and back."""

import re
from dataclasses import fields as dataclass_fields
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, LlamaConfig, PreTrainedConfig
from transformers.utils import logging

from modeling_infini import InfiniConfig


logger = logging.get_logger(__name__)

# What each architecture fixes in its code, where Llama has a field for it.
FIXED_FIELDS: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": False, "qkv_bias": True, "attention_output_bias": False, "mlp_bias": False},
    "qwen3": {"qk_norm": True, "mlp_bias": False},
}
SUPPORTED_MODEL_TYPES = tuple(FIXED_FIELDS)

# A window of the source's own: its meaning moves to `local_attention`.
WINDOW_FIELDS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")

# Settings of generation for caches that this model has not.
CACHE_FIELDS = ("cache_implementation", "cache_config", "max_cache_len", "continuous_batching_config")

# What is kept in `converted_from` for the way back alone. `use_cache=False` is what training leaves behind; without
# its cache a converted model would read everything again for each token. Old configurations say how to generate.
RETURN_FIELDS = (*WINDOW_FIELDS, "use_cache", *CACHE_FIELDS)

# What belongs to the source's files and not to its architecture.
FILE_FIELDS = ("architectures", "auto_map", "dtype", "model_type", "transformers_version", "transformers_weights")

# What transformers reads of every configuration, though not all classes have such a field, and its older spellings.
COMMON_FIELDS = (
    "head_dim",
    "is_causal",
    "layer_types",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
)

DEQUANTIZE = (
    "quantized weights; save a dequantized copy first: "
    "`AutoModelForCausalLM.from_pretrained(...).dequantize().save_pretrained(...)`"
)

UNSUPPORTED_FIELDS = {
    "attn_logit_softcapping": "soft-capping of attention logits",
    "compression_config": DEQUANTIZE,
    "final_logit_softcapping": "soft-capping of logits",
    "is_encoder_decoder": "an encoder",
    "logit_scale": "scaled logits",
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "quantization": DEQUANTIZE,
    "quantization_config": DEQUANTIZE,
}

# What is read before transformers has looked at it.
FIELD_KINDS: dict[str, type] = {
    "architectures": list,
    "auto_map": dict,
    "layer_types": list,
    "rope_parameters": dict,
    "rope_scaling": dict,
}

# What the fields are called with which other architectures change the computation.
COMPUTATION = re.compile(
    "scal|multiplier|softcap|expert|moe_|alibi|clip|clamp|residual|sliding|window|chunk|rope|rotary|interleave"
    "|qk_?(layer)?norm|causal|bidirectional|cross_attention|temperature|sparse|nextn|mtp|logit"
)

INFINI_FIELDS = tuple(InfiniConfig.__annotations__)

# The fields that decide which parameters and norms a layer of the base has.
STRUCTURE_FIELDS = ("qkv_bias", "attention_output_bias", "mlp_bias", "lm_head_bias", "qk_norm")

# What a memory brings to the configuration of its base.
MEMORY_OPTIONS = tuple(name for name in INFINI_FIELDS if name not in (*STRUCTURE_FIELDS, "converted_from"))

# Of a conversion. The memory is not trained yet: gates that are nearly closed leave the language as it is.
DEFAULTS: dict[str, Any] = {"head_gate_init_value": 4.0, "use_mem_delta_rule": False, "num_memory_slots": 0}


def infini_config(
    source: PreTrainedConfig,
    *,
    origin: dict[str, Any],
    segment_length: int | None = None,
    local_attention: Literal["segment", "sliding"] | None = None,
    num_sink_tokens: int | None = None,
    **memory_fields,
) -> InfiniConfig:
    """
    The configuration of a source's conversion, with every field of the source that still means something.

    Args:
        segment_length: `None` for the source's own sliding window, if it has one.
        local_attention: `None` for `"sliding"`.
        num_sink_tokens: `None` for 4 in `"sliding"`, but 0 where the source has a window of its own in all layers:
            it was trained without them.
        origin: name, revision and licence of the source, for `converted_from`.
        memory_fields: others that a memory brings; `None` for the default of a conversion.

    Raises:
        ValueError: if the source, or this memory for it, is not supported; the message says what is.
    """
    local_attention = local_attention or "sliding"
    for name, default in DEFAULTS.items():
        if memory_fields.get(name) is None:
            memory_fields[name] = default
    window = _own_window(source)
    if segment_length is None:
        if window is None:
            raise ValueError(
                "segment_length is needed: the source has no sliding window of its own to take it from. 1024 suits "
                f"most models; twice that must fit into the {source.max_position_embeddings} positions of the source."
            )
        segment_length = window
    if window is not None and segment_length > window:
        raise ValueError(
            f"segment_length={segment_length} must not exceed the source's own sliding window of {window} tokens: "
            "it was trained to see no further."
        )
    if num_sink_tokens is None:
        num_sink_tokens = 4 if local_attention == "sliding" and not _slides_everywhere(source) else 0

    values = source.to_dict()
    converted_from = {**origin, "model_type": source.model_type}
    converted_from |= {name: values[name] for name in RETURN_FIELDS if name in values}
    if converted_from.get("use_cache"):
        del converted_from["use_cache"]
    kept = {
        name: value
        for name, value in values.items()
        if name not in (*FILE_FIELDS, *RETURN_FIELDS, *INFINI_FIELDS) and not name.startswith("_")
    }
    try:
        config = InfiniConfig(
            **kept | FIXED_FIELDS[source.model_type],
            segment_length=segment_length,
            local_attention=local_attention,
            num_sink_tokens=num_sink_tokens,
            converted_from=converted_from,
            **memory_fields,
        )
    except StrictDataclassError as error:
        # Without the wrapping, which shows the whole configuration.
        raise ValueError(str(error.__cause__ or error)) from error
    require_known_distances(config)
    return config


def require_known_distances(config: InfiniConfig) -> None:
    """Raises ValueError if a token would see others at a distance that the base was not trained on."""
    if config.longest_distance > config.max_position_embeddings:
        reach = "2 * segment_length + num_sink_tokens" if config.is_sliding else "segment_length"
        reach += " + num_memory_slots" if config.num_memory_slots else ""
        longest = config.max_position_embeddings
        if config.is_sliding:
            longest = (longest - config.num_sink_tokens - config.num_memory_slots) // 2
        slots_left = config.max_position_embeddings - config.longest_distance + config.num_memory_slots
        choices = [f"a num_memory_slots of at most {slots_left}"] if slots_left >= 0 else []
        choices += [f"a segment_length of at most {longest}"] if longest >= max(1, config.num_sink_tokens) else []
        raise ValueError(
            f'With local_attention="{config.local_attention}", {reach} = {config.longest_distance} must not exceed '
            f"the {config.max_position_embeddings} positions that the source was trained on. Choose "
            f"{', or '.join(choices) or 'fewer slots and sinks'}."
        )


def base_config(config: InfiniConfig, model_type: str | None = None) -> PreTrainedConfig:
    """
    The configuration of the base architecture.

    Args:
        model_type: by default the one that the model was converted from; else the first that has its parameters.

    Raises:
        ValueError: if no supported architecture has this model's parameters.
    """
    origin = config.converted_from or {}
    model_type = model_type or origin.get("model_type")
    for candidate in SUPPORTED_MODEL_TYPES if model_type is None else (model_type,):
        if candidate not in SUPPORTED_MODEL_TYPES:
            raise ValueError(f'model_type="{candidate}" is not supported; take {listed(SUPPORTED_MODEL_TYPES)}.')
        base = _as_architecture(config, candidate, origin)
        if structure(base) == structure(config):
            return base
    has = ", ".join(f"{name}={value}" for name, value in structure(config).items())
    candidates = listed(SUPPORTED_MODEL_TYPES) if model_type is None else f'"{model_type}"'
    raise ValueError(f"The model has {has}; {candidates} cannot represent that.")


def structure(config: PreTrainedConfig) -> dict[str, bool]:
    """Which biases and norms the layers of a model have."""
    found = {name: getattr(config, name, None) for name in ("attention_bias", *STRUCTURE_FIELDS)}
    found |= FIXED_FIELDS.get(config.model_type, {})
    for name in ("qkv_bias", "attention_output_bias"):
        found[name] = found["attention_bias"] if found[name] is None else found[name]
    return {name: bool(found[name]) for name in STRUCTURE_FIELDS}


def _as_architecture(config: InfiniConfig, model_type: str, origin: dict[str, Any]) -> PreTrainedConfig:
    base_class = type(AutoConfig.for_model(model_type))
    known = _field_names(base_class)
    foreign = {*FILE_FIELDS, *INFINI_FIELDS, *_field_names(LlamaConfig) - known}
    kept = {
        name: value for name, value in config.to_dict().items() if name not in foreign and not name.startswith("_")
    }
    if "attention_bias" in known:
        kept["attention_bias"] = structure(config)["qkv_bias"]
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        # An attribute of every architecture, though not a field of every configuration.
        kept["head_dim"] = config.head_dim
    if origin.get("model_type") == model_type:
        kept |= {name: origin[name] for name in RETURN_FIELDS if name in origin}
        _fit_layer_types(kept, config.num_hidden_layers)
    elif origin.get("model_type") == "mistral" and origin.get("sliding_window"):
        raise ValueError(
            f"The model was converted from a Mistral that sees {origin['sliding_window']} tokens; a {model_type} has "
            "no such window."
        )
    elif model_type == "mistral":
        # Full attention, as in the others.
        kept["sliding_window"] = None
    return base_class(**kept)


def _fit_layer_types(fields: dict[str, Any], layers: int) -> None:
    """After layers were cut or added: those that were alike are known, which of others are left is not."""
    kinds = fields.get("layer_types") or []
    if len(kinds) not in (0, layers):
        if len(set(kinds)) > 1:
            raise ValueError(
                f"The model has {layers} layers, and was converted from {len(kinds)} of several kinds: which of them "
                "are left is not known. Set layer_types in converted_from of its config.json."
            )
        fields["layer_types"] = kinds[:1] * layers


def _field_names(config_class: type) -> set[str]:
    return {field.name for field in dataclass_fields(config_class)}


def require_supported(fields: dict[str, Any]) -> None:
    """
    Passes what is known and used, and what asks for nothing; warns of fields that no architecture here has.

    Args:
        fields: of a source's configuration, as its config.json has them.

    Raises:
        ValueError: if the source is of another architecture, or has a feature that Infini-attention has not.
    """
    supported = (
        f"Supported are the model types {listed(SUPPORTED_MODEL_TYPES)}, dense and with full rotary embeddings."
    )
    model_type = fields.get("model_type")
    if model_type == InfiniConfig.model_type:
        raise ValueError(
            "The source is an Infini-attention checkpoint already. To convert it with other options, take its base "
            "model: `infini convert-back` gives it back."
        )
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f'Cannot convert a model of type "{model_type!s:.100}". {supported}')
    for name, kind in FIELD_KINDS.items():
        if not isinstance(fields.get(name) or kind(), kind):
            raise ValueError(f"config.json has {name}={fields[name]!r:.200}, which must be a {kind.__name__}.")
    for name, feature in UNSUPPORTED_FIELDS.items():
        if not says_nothing(name, fields.get(name)):
            raise ValueError(f"Cannot convert a model with {feature} (its configuration has {name}). {supported}")
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    share = rope.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise ValueError(f"Cannot convert a model with partial rotary embeddings ({share} of each head). {supported}")
    if text := {name: value for name, value in rope.items() if isinstance(value, str) and "type" not in name}:
        raise ValueError(f"config.json has {text!s:.200} in its rotary embeddings, which must be numbers.")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"Cannot convert a model whose rotary embeddings differ between layers. {supported}")
    if fields.get("is_causal") is False:
        raise ValueError("Cannot convert a model that attends in both directions (its configuration has is_causal).")
    _require_known_layers(model_type, fields)
    _require_language_model(fields)
    _require_stock_code(model_type, fields)
    _require_known_fields(model_type, fields)


def _require_known_layers(model_type: str, fields: dict[str, Any]) -> None:
    kinds = set(fields.get("layer_types") or ()) - {"full_attention"}
    slides = model_type.startswith("qwen") and fields.get("use_sliding_window") and fields.get("sliding_window", 1)
    if foreign := sorted(kinds - ({"sliding_attention"} if slides else set())):
        raise ValueError(
            f"Cannot convert a {model_type} with layers of the type {listed(foreign):.200} (its configuration has "
            f"layer_types, and sliding_window={fields.get('sliding_window')})."
        )


def _require_language_model(fields: dict[str, Any]) -> None:
    classes = fields.get("architectures") or ()
    if classes and not any(name.lower().endswith("forcausallm") for name in classes):
        raise ValueError(
            f"Cannot convert a {classes[0]:.100}: it is no causal language model, and what its head has learned would "
            "be lost. Convert the language model that it was made from, and train a head on the conversion."
        )


def _require_stock_code(model_type: str, fields: dict[str, Any]) -> None:
    own = {name: code for name, code in (fields.get("auto_map") or {}).items() if name != "AutoTokenizer"}
    if own:
        raise ValueError(
            f"Cannot convert a model with code of its own (its configuration has auto_map: {own!s:.300}), which may "
            f"compute something else than a {model_type} of transformers. If it does not, remove auto_map from a copy "
            "of its config.json."
        )


def _require_known_fields(model_type: str, fields: dict[str, Any]) -> None:
    known = _field_names(type(AutoConfig.for_model(model_type))) | set(GenerationConfig().to_dict())
    # Windows that are off are left behind where a model of another type became a Llama. The memory's fields are ours.
    windows = WINDOW_FIELDS if fields.get("use_sliding_window") is False else ()
    ours = set(INFINI_FIELDS) - set(STRUCTURE_FIELDS)
    foreign = {
        name: value
        for name, value in fields.items()
        if name not in {*known, *FILE_FIELDS, *COMMON_FIELDS, *windows}
        and not name.startswith("_")
        and not says_nothing(name, value)
    }
    if computing := [name for name in foreign if COMPUTATION.search(name) and name not in ours]:
        raise ValueError(
            f"Cannot convert a model whose configuration has {computing[0]:.100}={foreign[computing[0]]!s:.100}: "
            f"a {model_type} has no such field, and it may change what the model computes. If it does not, remove it "
            "from a copy of its config.json."
        )
    if foreign:
        logger.warning("A %s has no such fields; they change nothing: %s.", model_type, ", ".join(foreign))


def says_nothing(name: str, value: Any) -> bool:
    """Whether a setting asks for nothing: it is off, or multiplies by one."""
    multiplies = re.search("scal|multiplier|factor", name) is not None
    return not value or value == "none" or (multiplies and value == 1)


def _own_window(source: PreTrainedConfig) -> int | None:
    """How many tokens the source itself sees in the layers that slide; `None` if none does."""
    return source.sliding_window if any(_layers_that_slide(source)) else None


def _slides_everywhere(source: PreTrainedConfig) -> bool:
    return all(_layers_that_slide(source))


def _layers_that_slide(source: PreTrainedConfig) -> list[bool]:
    # A field of this name in a Llama's configuration has no meaning.
    if source.model_type == "llama" or source.sliding_window is None:
        return [False]
    if source.model_type == "mistral":
        return [True]
    return [layer_type == "sliding_attention" for layer_type in source.layer_types]


def listed(names) -> str:
    """Names, quoted, for a message."""
    return ", ".join(f'"{name}"' for name in names)
