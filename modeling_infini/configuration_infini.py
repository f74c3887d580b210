"""Configuration of Infini-attention models."""

import filecmp
import os
import re
import reprlib
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Which of the code files' classes each Auto class loads with trust_remote_code=True.
AUTO_MAP = {
    "AutoConfig": "configuration_infini.InfiniConfig",
    "AutoModel": "modeling_infini.InfiniModel",
    "AutoModelForCausalLM": "modeling_infini.InfiniForCausalLM",
    "AutoModelForQuestionAnswering": "modeling_infini.InfiniForQuestionAnswering",
    "AutoModelForSequenceClassification": "modeling_infini.InfiniForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_infini.InfiniForTokenClassification",
}

MODELING_FILE = "modeling_infini.py"

# Styles of tensor parallelism, which `modeling_infini.py` registers.
SHARED_OUT_BY_HEADS = "infini_shared_out_by_heads"
SHARED_BY_HEADS = "infini_shared_by_heads"

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

# Computed with in float32.
POSITIVE_FIELDS = ("head_gate_scale", "memory_eps", "memory_norm_init_scale")
FLOAT_FIELDS = ("head_gate_init_value", *POSITIVE_FIELDS)

# What a memory means depends on these fields, on `projection_biases` and on `layers_with_memory`.
MEMORY_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "mlp_bias",
    "qk_norm",
    "segment_length",
    "local_attention",
    "num_sink_tokens",
    "use_mem_delta_rule",
    "learned_delta_update",
    "memory_feature_map",
    "token_gates",
    "num_memory_slots",
    "slot_layers",
    "memory_norm_init_scale",
    "memory_write_gate",
    "memory_eps",
    "head_gate_scale",
)

# Values of `rope_parameters` that say what holds without them.
ROPE_DEFAULTS = {"partial_rotary_factor": 1, "beta_fast": 32, "beta_slow": 1, "truncate": True}

# Whoever sends a file decides how long the values are that a message would have.
_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxdict = _BRIEFLY.maxlist = 20
_BRIEFLY.maxlevel = 3
_BRIEFLY.maxstring = _BRIEFLY.maxother = 100


def code_files(folder: Path) -> list[Path]:
    """The models' code in `folder`: their own file, then those that it imports."""
    modeling_file = folder / MODELING_FILE
    return [Path(file) for file in dict.fromkeys([str(modeling_file), *get_relative_import_files(modeling_file)])]


def copy_whole(file: Path, folder: Path) -> None:
    """Copies a file so that whoever reads it there meanwhile, as a push does, finds the whole of one or the other."""
    target = folder / file.name
    if target.is_file() and filecmp.cmp(file, target, shallow=False):
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix="_", delete=False) as copy:
        copy.write(file.read_bytes())
    shutil.copymode(file, copy.name)
    os.replace(copy.name, target)


def _copy_code(source: Path, folder: Path) -> None:
    # Where no model was saved before, a file of one of these names is the user's own.
    is_saved_anew = (folder / MODELING_FILE).is_file()
    files = code_files(source)
    for file in files:
        own = folder / file.name
        if not is_saved_anew and own.is_file() and own.read_bytes() != file.read_bytes():
            raise FileExistsError(
                f"{own} would be overwritten by the model's code file of this name. Save into another folder, "
                "or rename it."
            )
    # The models' file first: that it is there says whose the others are.
    for file in files:
        copy_whole(file, folder)


@strict
class InfiniConfig(LlamaConfig):
    r"""
    Every field of [`LlamaConfig`], and those of the compressive memory.

    Args:
        segment_length (`int`, defaults to 2048):
            Number of tokens N in a segment. A segment is written to the memory when it is complete.
        use_mem_delta_rule (`bool`, defaults to `False`):
            Write with the delta rule, which takes from each value what the memory returns for its key, instead of the
            linear rule.
        local_attention (`"segment"` or `"sliding"`, defaults to `"segment"`):
            What a token sees beside the memory. `"segment"`: the tokens of its own segment (the paper). `"sliding"`:
            the last `segment_length` tokens, and the first `num_sink_tokens` tokens of the stream.
        num_sink_tokens (`int`, defaults to 0):
            Attention sinks of `"sliding"`: tokens at the start of the stream that stay visible for ever.
        head_gate_init_value (`float`, defaults to 0.0):
            Logit of the gates at initialization. 0.0 is half open; a gate that starts closed stays closed.
        head_gate_scale (`float`, defaults to 10.0):
            The gate is `sigmoid(head_gate_scale * weight)`: the share of LOCAL attention, one per query head (in the
            paper, arXiv 2404.07143 eq. 10, the sigmoid is the share of the memory). Under Adam, a step of `lr` on the
            weight moves the logit by `head_gate_scale * lr`, so that one learning rate suits gates and matrices.
        memory_eps (`float`, defaults to 1e-10):
            Lower bound of the denominator of a memory read.
        qkv_bias, attention_output_bias (`bool`, *optional*):
            Bias of the query, key and value projections, and of the output projection. `None`: as `attention_bias`.
        qk_norm (`bool`, defaults to `False`):
            RMS-norm on the queries and keys of each head, as in Qwen3.
        lm_head_bias (`bool`, defaults to `False`):
            Bias of the language modeling head, as in infini-transformer-pytorch.
        learned_delta_update (`bool`, defaults to `False`):
            Learn how strongly each token is written to the memory, per KV head: beta = sigmoid(W x) scales what the
            linear or the delta rule adds to M (not to z), as in infini-transformer-pytorch, whose weight is 1 - beta.
        memory_norm_init_scale (`float`, *optional*):
            RMS-norm on the queries and keys of the memory, not on those of local attention, each head's times a
            learned scale that starts here; `None`: no norm. The greater the scale, the more sharply sigma tells keys
            apart: what a token that is not to be remembered weighs in later reads falls exponentially with it.
        memory_write_gate (`bool`, defaults to `False`):
            Learn how much of each token is remembered, per KV head: log g, with the gate g = sigmoid(W x + b), is
            added to the key that the memory gets. Where sigma is exponential, that multiplies what the token adds to M
            and z by g, so that a token may weigh nothing in later reads. Starts at g = 0.95.
        memory_layers (`list[int]`, *optional*):
            Indices of the layers that have a memory. The others are local attention alone, without the state and the
            cost of a memory. `None`: all layers have one.
        memory_feature_map (`"elu"` or `"exp"`, defaults to `"elu"`):
            What takes the place of the softmax's exponential in the memory. `"elu"`: sigma(x) = elu(x) + 1, as in the
            paper. `"exp"`: a map that each head learns, exp(W x + b) and exp(-W x - b) side by side (Hedgehog,
            arXiv 2402.04347), in which M and z have twice as many rows.
        token_gates (`bool`, defaults to `False`):
            Let the gate of a head depend on the token that reads, too: a learned W x is added to the gate's logit.
        num_memory_slots (`int`, defaults to 0):
            Number of tokens whose exact keys and values a layer keeps, chosen where a segment ends by a score that the
            layer gives each token: W x, one for all heads. They are seen in the softmax of local attention. Needs
            `"sliding"`. With weights of 0, as at initialization, the latest tokens stay: a longer window.
        slot_layers (`list[int]`, *optional*):
            Indices of the layers that have slots, with or without a memory beside them. `None`: all layers, if
            `num_memory_slots` is not 0.
        converted_from (`dict`, *optional*):
            What the model was converted from: `model_type`, and what is known of `name`, `revision` and `license`,
            besides those of its fields that have no meaning here. Written by conversions, read by model cards.

    Raises:
        ValueError: for a combination of fields that has no meaning; the message names the field and the rule.
    """

    model_type = "infini"

    segment_length: int = 2048
    use_mem_delta_rule: bool = False
    local_attention: Literal["segment", "sliding"] = "segment"
    num_sink_tokens: int = 0
    head_gate_init_value: float | int = 0.0
    head_gate_scale: float | int = 10.0
    memory_eps: float | int = 1e-10
    qkv_bias: bool | None = None
    attention_output_bias: bool | None = None
    qk_norm: bool = False
    lm_head_bias: bool = False
    learned_delta_update: bool = False
    memory_norm_init_scale: float | int | None = None
    memory_write_gate: bool = False
    memory_layers: list[int] | None = None
    memory_feature_map: Literal["elu", "exp"] = "elu"
    token_gates: bool = False
    num_memory_slots: int = 0
    slot_layers: list[int] | None = None
    converted_from: dict | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """As [`PreTrainedConfig.get_config_dict`]. Raises ValueError for the configuration of another model."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if (model_type := fields.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {_BRIEFLY.repr(model_type)}, whose "
                "configuration says nothing of a memory. InfiniForCausalLM.from_pretrained(..., segment_length=...) "
                "converts it, if it can."
            )
        return fields, kwargs

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How tensor parallelism shards the modules that there are: everything of a head goes with it."""
        of_attention: dict[str, str] = {}
        for name in self.float32_modules:
            of_attention |= {name: SHARED_OUT_BY_HEADS, f"{name}.weight": SHARED_OUT_BY_HEADS}
            if name.endswith("_map"):
                of_attention[f"{name}.bias"] = SHARED_OUT_BY_HEADS
        if self.learned_delta_update:
            of_attention["memory.write_strength"] = "colwise"
        if self.memory_write_gate:
            of_attention["memory.write_gate"] = "colwise"
        if self.token_gates:
            of_attention["memory.token_gate"] = "colwise"
        if self.qk_norm:
            of_attention |= {"q_norm": SHARED_BY_HEADS, "k_norm": SHARED_BY_HEADS}
        of_llama = LlamaConfig.base_model_tp_plan | {"embed_tokens": "embedding_rowwise"}
        return of_llama | {f"layers.*.self_attn.{name}": style for name, style in of_attention.items()}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]):
        # Some versions of transformers add tied embeddings, which are in the plan in any case.
        if foreign := sorted(name for name, style in plan.items() if self.base_model_tp_plan.get(name) != style):
            raise ValueError(f"The plan of tensor parallelism follows from the fields; it cannot be set: {foreign}.")

    @property
    def projection_biases(self) -> dict[str, bool]:
        """`qkv_bias` and `attention_output_bias`, with the default that `None` stands for."""
        given = {name: getattr(self, name) for name in ("qkv_bias", "attention_output_bias")}
        return {name: self.attention_bias if bias is None else bias for name, bias in given.items()}

    @property
    def layers_with_memory(self) -> list[int]:
        """`memory_layers`, with the default that `None` stands for."""
        return list(range(self.num_hidden_layers)) if self.memory_layers is None else self.memory_layers

    @property
    def layers_with_slots(self) -> list[int]:
        """`slot_layers`, with the default that `None` stands for; none where there are no slots."""
        layers = list(range(self.num_hidden_layers)) if self.slot_layers is None else self.slot_layers
        return layers if self.num_memory_slots else []

    @property
    def memory_key_dim(self) -> int:
        """Number of features of a key: the rows of a head's M."""
        return 2 * self.head_dim if self.memory_feature_map == "exp" else self.head_dim

    @property
    def float32_modules(self) -> list[str]:
        """The modules of an attention with memory whose parameters are of heads, and at least in float32."""
        names = [] if self.memory_norm_init_scale is None else ["query_norm", "key_norm"]
        names += ["query_map", "key_map"] if self.memory_feature_map == "exp" else []
        return ["head_gates", *(f"memory.{name}" for name in names)]

    @property
    def is_sliding(self) -> bool:
        """Whether local attention is a sliding window (with or without sinks)."""
        return self.local_attention == "sliding"

    @property
    def longest_distance(self) -> int:
        """Upper bound, in tokens, of the distance between a token and what it sees locally."""
        if not self.is_sliding:
            return self.segment_length
        return 2 * self.segment_length + self.num_memory_slots + self.num_sink_tokens

    def memory_fields(self) -> dict[str, Any]:
        """
        What a cache must share with the model that uses it: fields by name, as JSON returns them, equal for
        configurations that say the same in other words.
        """
        fields = {name: getattr(self, name) for name in MEMORY_FIELDS} | self.projection_biases
        fields |= {"memory_layers": self.layers_with_memory, "slot_layers": self.layers_with_slots}
        rope_parameters = dict(self.rope_parameters)
        if rope_parameters.get("rope_type") == "yarn" and rope_parameters.get("factor") is None:
            # As transformers has it.
            original = rope_parameters["original_max_position_embeddings"]
            rope_parameters["factor"] = self.max_position_embeddings / original
        fields["rope_parameters"] = {
            name: value
            for name, value in rope_parameters.items()
            # `type` is the older name of `rope_type`, kept beside it.
            if value is not None and name != "type" and not (name in ROPE_DEFAULTS and value == ROPE_DEFAULTS[name])
        }
        return fields

    def require_same_memory(self, fields: dict[str, Any], holder: str) -> None:
        """
        Refuses a cache whose model has other `fields`, as [`~InfiniConfig.memory_fields`] gives them.

        Args:
            fields: of the model that made the cache.
            holder: what to call the cache in the message.

        Raises:
            ValueError: if a field differs; the message has both values.
        """
        own = self.memory_fields()
        for name in (*own, *fields):
            if name not in own or name not in fields or fields[name] != own[name]:
                there, here = (_BRIEFLY.repr(of[name]) if name in of else "unknown" for of in (fields, own))
                raise ValueError(
                    f"{holder} belongs to another model: it was made with {name}={there}, and this model has "
                    f"{name}={here}. Use it with the model that made it, or make one with InfiniCache(model.config)."
                )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Saves the configuration with the code files beside it and an `auto_map` that names them, so that every Auto
        class loads it with `trust_remote_code=True`. All models save their configuration by this.

        Args:
            save_directory: the folder; made if it does not exist. Of one that is called `checkpoint-<number>`, the
                folder around it gets the code files too: a `Trainer` that pushes while it trains copies the
                configuration there.
            push_to_hub: also upload it.
            kwargs: as for [`~PreTrainedConfig.save_pretrained`].

        Raises:
            FileExistsError: if a file of the user's own has the name of a code file.
        """
        target = Path(save_directory)
        code_folder = self._code_folder(target)
        if code_folder is None:
            # Only the configuration's code was loaded from the Hub; that of the models stays there.
            self.auto_map = {name: f"{self.name_or_path}--{reference}" for name, reference in AUTO_MAP.items()}
        else:
            self.auto_map = dict(AUTO_MAP)
            target.mkdir(parents=True, exist_ok=True)
            _copy_code(code_folder, target)
            if re.fullmatch(r"checkpoint-\d+", target.name):
                try:
                    _copy_code(code_folder, target.parent)
                except FileExistsError as error:
                    logger.warning(
                        "What a Trainer pushes from %s will not load without this package: %s", target.parent, error
                    )
        super().save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)

    def _code_folder(self, target: Path) -> Path | None:
        """Where the models' code is: beside this file, where the configuration came from, or saved before it."""
        folders = [Path(__file__).parent, *([Path(self.name_or_path)] if self.name_or_path else []), target]
        return next((folder for folder in folders if (folder / MODELING_FILE).is_file()), None)

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        # A head_dim of its own (Qwen3) frees hidden_size from being a multiple of the number of heads.
        for name in ("head_dim", "num_attention_heads", "num_key_value_heads", "segment_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.head_dim is None or self.head_dim % 2 != 0:
            raise ValueError(f"head_dim={self.head_dim} must be an even number: RoPE rotates pairs of dimensions.")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if not 0 <= self.num_sink_tokens <= self.segment_length:
            raise ValueError(
                f"num_sink_tokens={self.num_sink_tokens} must be between 0 and segment_length={self.segment_length}."
            )
        if self.num_memory_slots < 0:
            raise ValueError(f"num_memory_slots={self.num_memory_slots} must be at least 0.")
        for name in ("num_sink_tokens", "num_memory_slots"):
            if (value := getattr(self, name)) > 0 and not self.is_sliding:
                raise ValueError(
                    f'{name}={value} needs local_attention="sliding"; with local_attention="{self.local_attention}" '
                    "it must be 0."
                )
        for name in ("memory_layers", "slot_layers"):
            layers = getattr(self, name)
            if layers is not None and any(not 0 <= a < b for a, b in pairwise([*layers, self.num_hidden_layers])):
                raise ValueError(
                    f"{name}={_BRIEFLY.repr(layers)} must be indices of the num_hidden_layers="
                    f"{self.num_hidden_layers} layers, from 0 on, each greater than the one before."
                )
        if self.slot_layers is not None and bool(self.slot_layers) != (self.num_memory_slots > 0):
            raise ValueError(
                f"slot_layers={_BRIEFLY.repr(self.slot_layers)} contradicts num_memory_slots={self.num_memory_slots}, "
                "the number of slots in each of them. Without slots, num_memory_slots is 0 and slot_layers None."
            )
        self._validate_floats()
        if getattr(self, "is_causal", True) is False:
            raise ValueError("is_causal=False is not supported: a memory holds what was read before.")
        self._validate_rope()

    def _validate_floats(self):
        single = torch.finfo(torch.float32)
        for name in FLOAT_FIELDS:
            value = getattr(self, name)
            if value is None:
                continue
            if not abs(value) <= single.max:
                raise ValueError(f"{name}={value} is not finite in float32.")
            if name in POSITIVE_FIELDS and value < single.tiny:
                raise ValueError(f"{name}={value} must be positive, and not below {single.tiny:.4g} (float32).")
        if abs(self.head_gate_init_value / self.head_gate_scale) > single.max:
            raise ValueError(
                f"head_gate_init_value={self.head_gate_init_value} is not finite in float32 when it is divided by "
                f"head_gate_scale={self.head_gate_scale}."
            )

    def _validate_rope(self):
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise ValueError(
                f'rope_type="{rope_type}" is not supported: its angles depend on more than the distance within a '
                f"window. Supported: {', '.join(SUPPORTED_ROPE_TYPES)}."
            )
        partial = (self.rope_parameters or {}).get("partial_rotary_factor")
        if rope_type != "default" and partial not in (None, 1):
            raise ValueError(
                f'partial_rotary_factor={partial} is not supported with rope_type="{rope_type}": heads are rotated as '
                "a whole."
            )
        if rope_type == "dynamic" and self.longest_distance > self.max_position_embeddings:
            raise ValueError(
                f'rope_type="dynamic" changes its frequencies beyond max_position_embeddings='
                f"{self.max_position_embeddings}, but local attention reaches {self.longest_distance} tokens. "
                f"Choose a smaller segment_length={self.segment_length}"
                + (f" or num_memory_slots={self.num_memory_slots}." if self.num_memory_slots else ".")
            )


__all__ = ["InfiniConfig"]


def is_infini_config(config: Any) -> bool:
    """Whether a configuration is an [`InfiniConfig`], also one of a copy of this code that came with a model."""
    return isinstance(config, InfiniConfig) or getattr(config, "model_type", None) == InfiniConfig.model_type
