"""
A memory by itself: what training adds to a conversion, saved without the base that it belongs to.

    memory.safetensors     head gates, scores of slots, and all in the layers' memories, by their names in the model
    memory_config.json     the fields of the configuration that go with them, and which base they belong to
    README.md              the card
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import logging

from modeling_infini import InfiniConfig, InfiniPreTrainedModel
from modeling_infini.cache import MAX_HEADER, digest_of
from modeling_infini.modeling_infini import InfiniAttention, require_place

from .architectures import MEMORY_OPTIONS
from .base_fingerprint import base_fingerprint, in_float16
from .checkpoints import WEIGHT_DTYPES, Checkpoint, is_memory_weight, new_folder, read_json, write_json
from .model_card import memory_card
from .small_files import CARD
from .wrong_sources import what_it_holds


logger = logging.get_logger(__name__)


MEMORY_FILE = "memory.safetensors"
MEMORY_CONFIG = "memory_config.json"
FORMAT_VERSION = 1

FIELDS = {"format_version": int, "memory": dict, "base": dict, "sha256": str}
# What is known of the base, besides its fingerprint and its `config`.
ORIGIN_FIELDS = ("model_type", "name", "revision", "license", "license_name", "license_link")

# Whoever sends a file decides what it says: more than this is no configuration, and no model has more layers.
LARGEST_CONFIG = 2**20
MOST_LAYERS = 10_000

# What raises where a configuration holds other things than a model's fields.
NO_CONFIG = (StrictDataclassError, ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass
class MemoryWeights:
    """
    What a memory adds to its base.

    Attributes:
        options: fields of [`InfiniConfig`].
        base: `fingerprint`; `config`, the fields of the base that a memory depends on; and what is known of
            `model_type`, `name`, `revision`, `license`.
        weights: every parameter of the memory by its name in the model, at least in float32.
        name: of the artefact on the Hub, if it comes from there.
    """

    options: dict[str, Any]
    base: dict[str, Any]
    weights: dict[str, torch.Tensor]
    name: str | None = None

    @classmethod
    def of(cls, source: str | os.PathLike | nn.Module, revision: str | None = None) -> "MemoryWeights":
        """
        Takes the memory out of a model.

        Args:
            source: a folder with an Infini-attention checkpoint, its id on the Hub, or a model.
            revision: of a model on the Hub.

        Raises:
            ValueError: if the base's weights are no longer those that the model was converted from, or the weights are
                those of a part, of an adapter, quantized, or not finite.
        """
        base: Any
        if isinstance(source, nn.Module):
            base, config = _plain_model(source)
            holder, weights = "the model", base.state_dict()
            read = weights.__getitem__
        else:
            base = Checkpoint(source, revision)
            holder, config, weights, read = str(source), base.infini_config, base.shapes, base.read
        fingerprint = base_fingerprint(base)
        origin = config.converted_from or {}
        if (recorded := origin.get("fingerprint", fingerprint)) != fingerprint:
            raise ValueError(
                f"The base's weights in {holder} are not those that it was converted from (their fingerprint is "
                f"{fingerprint[:16]}, and was {recorded[:16]}): they were trained too"
                + (", or are in another dtype (in float16, small weights are others)" if in_float16(base) else "")
                + ", and the memory is theirs. Publish the whole checkpoint, or train the memory's own parameters "
                "alone, and save it in the dtype of the conversion."
            )
        expected = memory_shapes(config)
        if not expected:
            raise ValueError(
                f"{holder} has no layer with a memory (memory_layers=[]) or with slots: there is nothing to save."
            )
        if missing := sorted(expected.keys() - weights.keys()):
            raise ValueError(f"{holder} lacks {missing[0]}, which its configuration asks for: it is no whole model.")
        taken = {name: at_least_float32(read(name)) for name in expected}
        require_fitting(taken, expected, holder)
        known = {name: _as_text(origin[name]) for name in ORIGIN_FIELDS if origin.get(name)}
        of_base = {"fingerprint": fingerprint, "config": base_fields(config), **known}
        return cls({name: getattr(config, name) for name in MEMORY_OPTIONS}, of_base, taken)

    @cached_property
    def config(self) -> InfiniConfig:
        """A configuration that has this memory, but not all that belongs to its base alone (its vocabulary)."""
        origin = {name: value for name, value in self.base.items() if name in ORIGIN_FIELDS}
        config = InfiniConfig(**self.base["config"], **self.options, converted_from=origin)
        if config.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers={config.num_hidden_layers} is more than {MOST_LAYERS:,}")
        return config

    @property
    def digest(self) -> str:
        """Of the weights, by [`memory_digest`]."""
        return memory_digest(self.weights)

    @property
    def as_origin(self) -> dict[str, str]:
        """Which memory it is, for the `converted_from` of what it is applied to."""
        return {"sha256": self.digest} | ({} if self.name is None else {"name": self.name})

    @property
    def local_shares(self) -> torch.Tensor:
        """What the gates give to local attention, `(layers, heads)`: 1 in layers without memory."""
        shares = torch.ones(self.config.num_hidden_layers, self.config.num_attention_heads)
        for layer in self.config.layers_with_memory:
            gates = self.weights[f"model.layers.{layer}.self_attn.head_gates.weight"]
            shares[layer] = torch.sigmoid(self.config.head_gate_scale * gates)
        return shares

    def require_base(self, source: Checkpoint | nn.Module, config: InfiniConfig, holder: str) -> None:
        """
        Args:
            source: what has the base's weights.
            config: of a conversion of it.
            holder: what to call it in the message.

        Raises:
            ValueError: if the memory belongs to another base.
        """
        name = self.base.get("name", "")[:100]
        whose = "a memory of " + (name or f"a {self.base.get('model_type', 'model'):.100}")
        own = base_fields(config)
        for field, value in self.base["config"].items():
            if not _same(value, own[field]):
                raise ValueError(
                    f"This is {whose} with {field}={value!r:.100}; {holder} has {field}={own[field]!r:.100}."
                )
        expected, fingerprint = self.base["fingerprint"], base_fingerprint(source)
        # What was trained on a conversion to float16 is the base's, too.
        if expected != fingerprint and base_fingerprint(source, torch.float16) != expected:
            advice = f"Take its base, {name}." if name else "Take its base."
            if in_float16(source):
                advice = (
                    "In float16, small weights are others: if it is the base but for that, take it in the base's own "
                    "dtype, or convert the base with the memory at once: convert_to_infini(..., memory=...)."
                )
            raise ValueError(
                f"This is {whose} with the fingerprint {expected[:16]}, and that of {holder} is {fingerprint[:16]}: "
                f"to weights that it was not trained with, a memory means nothing. {advice}"
            )

    def save(
        self,
        output: str | os.PathLike,
        *,
        repo_id: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
        training: str | None = None,
    ) -> Path:
        """
        Writes the memory into a folder of its own. It appears only when it is complete.

        Args:
            output: the folder to make.
            repo_id: where it will be on the Hub.
            base_model: id on the Hub of the base, if the model that the memory was taken from does not name it.
            license: identifier of the Hub, if the base's is not known.
            training: how it was trained and what it reaches, in Markdown.

        Raises:
            FileExistsError: if `output` holds something.
            ValueError: if the base is another one than `base_model`.
        """
        card = memory_card(
            self.config,
            self.local_shares,
            sum(weight.numel() for weight in self.weights.values()),
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            training=training,
        )
        known = {"name": base_model, "license": license}
        base = self.base | {name: value for name, value in known.items() if value is not None}
        fields = {"format_version": FORMAT_VERSION, "memory": self.options, "base": base, "sha256": self.digest}
        with new_folder(output) as folder:
            card.save(folder / CARD)
            save_file(self.weights, folder / MEMORY_FILE, metadata={"format": "pt"})
            write_json(folder / MEMORY_CONFIG, fields)
        return Path(output).absolute()

    @classmethod
    def load(cls, source: str | os.PathLike, revision: str | None = None) -> "MemoryWeights":
        """
        Reads what [`~MemoryWeights.save`] wrote. Whoever made it, it is data and nothing else: no code is run.

        Args:
            source: the folder, or its id on the Hub.
            revision: of a memory on the Hub.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or of another version; the message says what is wrong.
        """
        folder, name = Path(source), None
        if not folder.is_dir():
            folder, name = _downloaded(str(source), revision), str(source)
        for file in (MEMORY_CONFIG, MEMORY_FILE):
            if not (folder / file).is_file():
                names = [path.name for path in folder.iterdir()]
                raise FileNotFoundError(
                    f"{source} holds no memory that save-memory has saved: there is no {file}.{what_it_holds(names)}"
                )
        fields = _read_fields(folder / MEMORY_CONFIG)
        damage = f"The memory in {source} is damaged:"
        memory = cls(fields["memory"], fields["base"], {}, name)
        try:
            expected = memory_shapes(memory.config)
        except NO_CONFIG as error:
            raise ValueError(f"{damage} {MEMORY_CONFIG} describes no model ({_briefly(error)}).") from error
        memory.weights = _read_weights(folder / MEMORY_FILE, expected, damage)
        if memory.digest != fields["sha256"]:
            raise ValueError(f"{damage} {MEMORY_FILE} is not what was saved with {MEMORY_CONFIG}.")
        return memory


def save_memory(source: str | os.PathLike | nn.Module, output: str | os.PathLike, **card: str | None) -> Path:
    """
    Saves the memory of a converted and trained model by itself: a few MB, to be published without the base's weights.

    Args:
        source: a folder with the checkpoint, its id on the Hub, or the model.
        output: the folder to make: `memory.safetensors`, `memory_config.json` and a card.
        card: `repo_id`, `base_model`, `license`, `training`, as of [`MemoryWeights.save`].

    Returns:
        The output folder.

    Raises:
        FileExistsError: if `output` holds something.
        ValueError: if the base was trained too: its memory belongs to the trained base. Also for adapters and
            quantized models, whose base cannot be compared.
    """
    memory = MemoryWeights.of(source)
    if first_change(memory.weights, memory.weights.__getitem__, memory.config) is None:
        logger.warning(
            "The memory that is saved is as it was converted: nobody has taught it anything. `transfer` does "
            "(infini transfer), or a training."
        )
    return memory.save(output, **card)


def load_memory(model: nn.Module, memory: "str | os.PathLike | MemoryWeights") -> None:
    """
    Copies a memory's weights into a running model of its base.

    Args:
        model: an [`InfiniForCausalLM`] whose configuration asks for the same modules.
        memory: a folder that [`save_memory`] made, or its id on the Hub.

    Raises:
        ValueError: if the model is of another base, or has other fields; nothing is changed then.
    """
    memory = memory if isinstance(memory, MemoryWeights) else MemoryWeights.load(memory)
    own, config = _plain_model(model)
    there, here = memory.config.memory_fields(), config.memory_fields()
    for name in MEMORY_OPTIONS:
        # Where gates began is no field of them: it has no meaning when they are there.
        if name in here and not _same(there[name], here[name]):
            raise ValueError(
                f"The memory was trained with {name}={there[name]!r:.100}, and the model has "
                f"{name}={here[name]!r:.100}. Convert the base with it: convert_to_infini(base, folder, memory=...), "
                f"and load that; or load the conversion with {name} as the memory has it."
            )
    memory.require_base(own, config, "the model")
    weights = dict(own.named_parameters())
    with torch.no_grad():
        for name, weight in memory.weights.items():
            weights[name].copy_(weight)
    own.config.converted_from = {**(own.config.converted_from or {}), "memory": memory.as_origin}


def memory_digest(weights: dict[str, torch.Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes."""
    kinds = {name: f"{weight.dtype} {tuple(weight.shape)}" for name, weight in weights.items()}
    return digest_of(json.dumps(kinds, sort_keys=True), weights)


def memory_shapes(config: InfiniConfig) -> dict[str, torch.Size]:
    """The shape of each parameter that a memory of this configuration has, by its name in the model."""
    shapes: dict[str, torch.Size] = {}
    with_memory, with_slots = set(config.layers_with_memory), set(config.layers_with_slots)
    of_kind: dict[tuple[bool, bool], dict[str, torch.Size]] = {}
    for layer in sorted(with_memory | with_slots):
        kind = (layer in with_memory, layer in with_slots)
        if kind not in of_kind:
            parameters = _attention(config, layer).named_parameters(".self_attn")
            of_kind[kind] = {name: weight.shape for name, weight in parameters if is_memory_weight(name)}
        shapes |= {f"model.layers.{layer}{name}": shape for name, shape in of_kind[kind].items()}
    return shapes


def initial_memory_weights(config: InfiniConfig, layer: int) -> dict[str, torch.Tensor]:
    """What the parameters of a layer's memory start with, by their names in the model: by the layer's own seed."""
    prefix = f"model.layers.{layer}.self_attn."
    attention = _attention(config, layer)
    of_model = InfiniPreTrainedModel(config)
    weights: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which seeds accelerators as well.
        torch.default_generator.manual_seed(layer)
        for child, module in attention.named_children():
            if is_memory_weight(f"{prefix}{child}."):
                module.to_empty(device="cpu").apply(of_model._init_weights)
                weights |= dict(module.named_parameters(prefix + child))
    return {name: at_least_float32(weight) for name, weight in weights.items()}


def _attention(config: InfiniConfig, layer: int) -> InfiniAttention:
    """A layer's attention without weights; in float32, whatever the default is."""
    with local_torch_dtype(torch.float32), torch.device("meta"):
        return InfiniAttention(config, layer)


def first_change(names: Iterable[str], read: Callable[[str], torch.Tensor], config: InfiniConfig) -> str | None:
    """
    The first of a memory's weights that differs from what it starts with, also if it was rounded to 16 bits since;
    `None`: nothing was taught or set.
    """
    initial: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        initial |= initial_memory_weights(config, layer)
    for name in names:
        weight, start = read(name), initial.get(name)
        if start is None or not any(
            torch.equal(at_first.to(weight.dtype), weight) for at_first in (start, start.bfloat16(), start.half())
        ):
            return name
    return None


def is_taught(checkpoint: Checkpoint) -> bool:
    """Whether the memory of a conversion is another than it started with."""
    config = checkpoint.infini_config
    names = [name for name in checkpoint.shapes if is_memory_weight(name)]
    return "model_type" in (config.converted_from or {}) and first_change(names, checkpoint.read, config) is not None


def base_fields(config: InfiniConfig) -> dict[str, Any]:
    """The fields of the base that a memory depends on, as JSON returns them."""
    fields = config.memory_fields() | {"max_position_embeddings": config.max_position_embeddings}
    return {name: fields[name] for name in fields if name not in (*MEMORY_OPTIONS, "model_type")}


def require_fitting(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], holder: str) -> None:
    """Raises ValueError if weights are not of the shapes that are expected, or not finite."""
    for name, weight in weights.items():
        if name not in expected or weight.shape != expected[name]:
            fit = f"of {tuple(expected[name])}" if name in expected else "a parameter of this memory"
            raise ValueError(f"{name:.100} of {holder} is of the shape {tuple(weight.shape)!s:.100}, not {fit}.")
        if not weight.isfinite().all():
            raise ValueError(f"{name} of {holder} holds NaN or infinity: a training has gone wrong.")


def _plain_model(model: Any) -> tuple[Any, InfiniConfig]:
    """A causal language model whose base's weights can be looked at, and its configuration in this version."""
    # What is compiled holds it.
    model = getattr(model, "_orig_mod", model)
    config: Any = getattr(model, "config", None)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has adapters of PEFT, which its memory was trained with: save both with its save_pretrained. "
            "A memory by itself is that of a model without adapters."
        )
    if getattr(config, "model_type", None) != InfiniConfig.model_type or not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} is no InfiniForCausalLM, by whose base a memory is known. Save the model, and "
            "name its folder; a model with another head is loaded from a folder with the memory."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The model is quantized: whether its base is that of the memory cannot be seen. Apply the memory to the "
            "conversion in its folder (infini apply-memory), and quantize that."
        )
    # Remote code may be of another.
    return model, InfiniConfig.from_dict(config.to_dict())


def at_least_float32(weight: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.detach().to("cpu", dtype, copy=True).contiguous()


def _as_text(value: Any) -> str:
    """Of what a card says in YAML: a licence may be a list or a number there."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a field are alike; files of other formats round numbers to float32."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, float) and isinstance(other, (float, int)):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _downloaded(name: str, revision: str | None) -> Path:
    require_place(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[MEMORY_CONFIG, MEMORY_FILE]))
    except (OSError, HTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name} is no folder with a memory, and no id of the Hub that can be read. ({error})"
        ) from error


def _read_fields(file: Path) -> dict[str, Any]:
    """What a `memory_config.json` says, each field of its kind."""
    if file.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{file} is longer than {LARGEST_CONFIG:,} bytes: it is no configuration.")
    try:
        fields = read_json(file)
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply: it is no configuration.") from error
    if (version := fields.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{file} has format version {version!r:.20}; this code reads version {FORMAT_VERSION}.")
    if fields.keys() != FIELDS.keys() or any(type(fields[name]) is not kind for name, kind in FIELDS.items()):
        raise ValueError(f"{file} must have the fields {', '.join(FIELDS)}, each of its kind.")
    base = fields["base"]
    texts = {name: value for name, value in base.items() if name != "config"}
    if not isinstance(base.get("config"), dict) or not isinstance(base.get("fingerprint"), str):
        raise ValueError(f"{file} does not say which base its memory belongs to (fingerprint and config).")
    _require_known(file, texts, ("fingerprint", *ORIGIN_FIELDS))
    _require_known(file, base["config"], base_fields(InfiniConfig()))
    _require_known(file, fields["memory"], MEMORY_OPTIONS)
    # Options that came later are off in a memory that was saved before.
    fields["memory"] = {"slot_layers": None} | fields["memory"]
    wanted = {*base_fields(InfiniConfig()), *MEMORY_OPTIONS}
    if missing := sorted(wanted - base["config"].keys() - fields["memory"].keys()):
        raise ValueError(f"{file} does not say the {missing[0]} of the memory or of its base.")
    if any(not isinstance(value, str) for value in texts.values()):
        raise ValueError(f"{file} must say what the base is in texts.")
    return fields


def _briefly(error: BaseException) -> str:
    """What went wrong, without the whole of what a file says."""
    return f"{error.__cause__ or error!s:.300}"


def _require_known(file: Path, fields: Iterable[str], known: Iterable[str]) -> None:
    if foreign := sorted(set(fields) - set(known)):
        raise ValueError(
            f"{file} has the field {foreign[0]:.50}, which this version does not know: what it asks for would be "
            "lost. A newer version may know it."
        )


def _read_weights(file: Path, expected: Mapping[str, torch.Size], damage: str) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER:
            raise ValueError(f"{damage} the header of {file.name} is longer than {MAX_HEADER:,} bytes.")
    try:
        with safe_open(file, "pt") as content:
            names = content.keys()
            if different := sorted(set(names) ^ expected.keys()):
                state = "missing" if different[0] in expected else "no parameter of this memory"
                raise ValueError(f"{different[0]:.100} is {state}")
            for name in names:
                # From the header: nothing larger than what fits is read.
                if (shape := content.get_slice(name).get_shape()) != list(expected[name]):
                    raise ValueError(f"{name} is of the shape {tuple(shape)!s:.100}, not {tuple(expected[name])}")
            weights = {name: content.get_tensor(name).clone() for name in names}
    except (SafetensorError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{damage} {file.name} cannot be read ({_briefly(error)}).") from error
    for name, weight in weights.items():
        if weight.dtype not in WEIGHT_DTYPES or not weight.isfinite().all():
            raise ValueError(f"{damage} {name} is of {weight.dtype}, or holds NaN or infinity.")
    return weights
