"""GGUF files: every metadata key and every tensor of one is used, or refused by name."""

import json
import math
import os
import re
from collections.abc import Container, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .architectures import listed, says_nothing


logger = logging.get_logger(__name__)

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# What `general.type` may say of a file without a model, and what to do then.
OTHER_TYPES = {
    "adapter": "an adapter (LoRA). Merge it into its base model first (llama-export-lora of llama.cpp)",
    "mmproj": "the vision or audio part of a model. Name the file with its language model",
    "vocab": "a vocabulary without weights. Name the file with the whole model",
    "imatrix": "an importance matrix for quantization. Name the file with the model",
}

# Groups of keys that describe a file, its origin and its tokenizer, but not what the model computes.
DESCRIPTIVE = ("GGUF.", "general.", "split.", "quantize.", "imatrix.")

CHAT_TEMPLATE = "tokenizer.chat_template"

# Keys of the tokenizer that are used, or change nothing in one of these models (`add_sep_token` if it is off).
TOKENIZER_KEYS = (
    CHAT_TEMPLATE,
    "tokenizer.ggml.add_",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token",
    *(
        f"tokenizer.ggml.{name}_"
        for name in (
            "bos",
            "cls",
            "eom",
            "eos",
            "eot",
            "fim",
            "mask",
            "middle",
            "padding",
            "seperator",
            "suffix",
            "unknown",
        )
    ),
)

# What transformers and GGUF call them.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# Types of tokens that are never cut: control and user-defined ones.
WHOLE_TOKENS = (3, 4)

# What `tokenizer.ggml.pre` may name, as llama.cpp understands it. GPT-2's own split:
GPT2_SPLITS = (None, "default", "gpt-2", "gpt2", "olmo")

# Each digit by itself, then GPT-2's split.
DIGIT_SPLITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")

# Words of the vocabulary are taken whole, whatever the merges, and texts begin with BOS unless the file says no.
WHOLE_WORD_SPLITS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "tekken",
)

# Keys of an architecture that describe the file alone: scaled angles are given by others, and rows of q_proj and
# k_proj are always stored in one order.
DESCRIPTIVE_FIELDS = ("rope.scaling.finetuned", "tensor_data_layout")

# The tensor of Llama 3.1's scaling: what each frequency of RoPE is divided by.
ROPE_FREQS = "rope_freqs.weight"

# llama.cpp's own defaults, where a file does not say.
ROPE_THETA = 10_000.0
BETA_FAST, BETA_SLOW = 32.0, 1.0

# Quotients of the two edges between which Llama 3.1's scaling fades in, where the factors leave it open: its own, and
# others.
EDGE_RATIOS = (4.0, 2.0, 1.2, 1.02, 1.001)


def is_gguf(source: str | os.PathLike) -> bool:
    """Whether a source is a GGUF file by its name; it may not be there."""
    return Path(source).suffix.lower() == ".gguf"


class GGUFFile:
    """
    A causal language model in a `.gguf` file, dequantized to float32 weight by weight.

    Attributes:
        path: of the file.
        metadata: its keys and values.
    """

    def __init__(self, path: Path):
        """
        Raises:
            ModuleNotFoundError: if the package `gguf` is not installed.
            ValueError: if it is damaged, or holds something else than a whole causal language model.
        """
        try:
            from gguf import GGUFReader
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("GGUF files are read with the package gguf: `pip install gguf`.") from error
        self.path = path
        try:
            reader = GGUFReader(path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(
                f"{path} is incomplete or damaged, or no GGUF file ({error}). Download it again."
            ) from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._require_whole_model()

    def _require_whole_model(self) -> None:
        kind = self.metadata.get("general.type", "model")
        if self.architecture == "clip":
            kind = "mmproj"
        if kind in OTHER_TYPES:
            raise ValueError(f"{self.path} holds {OTHER_TYPES[kind]}.")
        if kind != "model":
            raise ValueError(f'{self.path} holds no model: its general.type is "{kind}".')
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(
                f"{self.path} is one of {self.metadata['split.count']} files of a model (split.count). Merge them "
                "first: `llama-gguf-split --merge first-file.gguf merged.gguf`, a tool of llama.cpp."
            )
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f'{self.path} is of the GGUF architecture "{self.architecture}". Supported are '
                f'{listed(ARCHITECTURES)}; Mistral models are of "llama".'
            )
        if not self._tensors:
            raise ValueError(f"{self.path} holds {OTHER_TYPES['vocab']}.")

    @property
    def licence(self) -> dict[str, str]:
        """What a model card calls the licence, its name and its link, as far as the file has them."""
        keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
        return {
            name: self.metadata[f"general.{key}"] for name, key in keys.items() if f"general.{key}" in self.metadata
        }

    @property
    def repository(self) -> str | None:
        """The id on the Hub of the model that the file holds, if it says so."""
        places = ("source.huggingface.repository", "source.repo_url", "source.url")
        for place in (str(self.metadata.get(f"general.{key}", "")) for key in places):
            if (found := re.fullmatch(r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+)/?", place)) is not None:
                return found[1]
        return None

    @property
    def title(self) -> str | None:
        """What the file calls its model, and who made it."""
        name, maker = (self.metadata.get(f"general.{key}") for key in ("name", "organization"))
        return f"{name} of {maker}" if name and maker else name

    @property
    def architecture(self) -> str | None:
        """Of the GGUF format, which calls a Mistral a llama."""
        return self.metadata.get("general.architecture")

    @cached_property
    def config(self) -> PreTrainedConfig:
        """
        The configuration, in the source's own class.

        Raises:
            ValueError: if a key is missing, or asks for something that the architecture has not; the message names it.
        """
        fields = _Fields(self.metadata, self.architecture)
        hidden_size = fields.take("embedding_length")
        heads = fields.take("attention.head_count")
        query_rows = self._rows("blk.0.attn_q.weight") or hidden_size
        head_dim = fields.take("attention.key_length", query_rows // heads)
        fields.expect("attention.value_length", head_dim)
        fields.expect("rope.dimension_count", head_dim)
        fields.expect("attention.scale", head_dim**-0.5)
        fields.expect("attention.causal", True)
        positions = fields.take("context_length")
        window = fields.take("attention.sliding_window", 0)
        if window >= positions:
            window = 0
        if window and self.architecture != "llama":
            fields.refuse("attention.sliding_window", window, "which layers it is for is not said")
        vocab_size = fields.take("vocab_size", self._rows("token_embd.weight"))
        config = {
            "hidden_size": hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": fields.take("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": fields.take("feed_forward_length"),
            "num_hidden_layers": fields.take("block_count"),
            "max_position_embeddings": positions,
            "rms_norm_eps": fields.take("attention.layer_norm_rms_epsilon"),
            "rope_parameters": _rope_parameters(fields, positions),
            "vocab_size": vocab_size,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": any(name.endswith("attn_q.bias") for name in self._tensors),
            "mlp_bias": any(name.endswith("ffn_up.bias") for name in self._tensors),
            "dtype": "float32",
            **self._token_ids(vocab_size),
        }
        model_type = self.architecture
        if window:
            model_type, config["sliding_window"] = "mistral", window
        if model_type in ("mistral", "qwen2"):
            del config["attention_bias"]
        if model_type != "llama":
            del config["mlp_bias"]
        fields.refuse_the_rest()
        self._warn_of_foreign_keys()
        source = AutoConfig.for_model(model_type, **config)
        if (factors := self._rope_factors()) is not None:
            source.rope_parameters = llama3_parameters(source, factors)
        return source

    def _rows(self, name: str) -> int | None:
        return int(self._tensors[name].shape[-1]) if name in self._tensors else None

    def _token_ids(self, vocab_size: int) -> dict[str, Any]:
        def ids(*names):
            found = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
            # llama.cpp passes over ids beyond the vocabulary too, such as -1.
            return list(dict.fromkeys(token for token in found if token is not None and 0 <= token < vocab_size))

        # Turns and messages end a text for llama.cpp too.
        ends = ids("eos", "eot", "eom")
        return {
            "bos_token_id": next(iter(ids("bos")), None),
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": next(iter(ids("padding")), None),
        }

    def _warn_of_foreign_keys(self) -> None:
        known = (*DESCRIPTIVE, *TOKENIZER_KEYS, f"{self.architecture}.")
        foreign = [key for key in self.metadata if not key.startswith(known) or key.startswith("general.sampling.")]
        if foreign:
            logger.warning("Keys of %s that are not used: %s.", self.path, ", ".join(foreign))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """
        The tokenizer, as llama.cpp would have it.

        Raises:
            ValueError: if there is none, or it cannot be rebuilt; the message names a key.
        """
        kind, split = (self.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        if kind not in ("gpt2", "llama"):
            raise ValueError(f'tokenizer.ggml.model is "{kind}", not "gpt2" or "llama"')
        if kind == "gpt2" and split not in (*GPT2_SPLITS, *DIGIT_SPLITS, *known_splits()):
            raise ValueError(f'how tokenizer.ggml.pre = "{split}" splits a text is not known')
        if self.metadata.get("tokenizer.ggml.add_sep_token"):
            raise ValueError("tokenizer.ggml.add_sep_token asks for separators")
        whole = kind == "gpt2" and split in WHOLE_WORD_SPLITS
        options = {
            "add_bos_token": self.metadata.get("tokenizer.ggml.add_bos_token", whole or kind == "llama"),
            "add_eos_token": self.metadata.get("tokenizer.ggml.add_eos_token", False),
        }
        try:
            # What stands beside the file may be another model's.
            with TemporaryDirectory() as alone:
                (Path(alone) / self.path.name).symlink_to(self.path.resolve())
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=self.path.name, **options)
            self._name_tokens(tokenizer)
        except (StrictDataclassError, IndexError, TypeError) as error:
            # transformers reads the configuration anew, and takes ids for tokens without a look.
            raise ValueError(str(error.__cause__ or error)) from error
        self._drop_foreign_tokens(tokenizer)
        backend = tokenizer.backend_tokenizer
        if isinstance(tokenizer, Qwen2Tokenizer):
            # GGUF has no key for it, transformers' reader leaves it out, and the class puts it back when it is loaded.
            backend.normalizer = normalizers.NFC()
        if whole:
            backend.model.ignore_merges = True
        if kind == "gpt2" and split in DIGIT_SPLITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
        if kind == "llama" and not self.metadata.get("tokenizer.ggml.add_space_prefix", True):
            plain = LlamaTokenizer(add_prefix_space=False).backend_tokenizer
            backend.pre_tokenizer, backend.decoder = plain.pre_tokenizer, plain.decoder
        self._require_whole_tokens(tokenizer)
        templates = {
            key.removeprefix(CHAT_TEMPLATE).lstrip("."): template
            for key, template in self.metadata.items()
            if key.startswith(CHAT_TEMPLATE) and isinstance(template, str)
        }
        if templates.keys() - {""}:
            tokenizer.chat_template = {name or "default": template for name, template in templates.items()}
        return tokenizer

    def _name_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tells the tokenizer its special tokens: transformers 5.16 takes BOS for EOS, too."""
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        for name, key in SPECIAL_TOKENS.items():
            index = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
            setattr(tokenizer, name, None if index is None else tokens[index])
        tokenizer.update_post_processor()

    def _drop_foreign_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Drops what transformers adds by default, such as GPT-2's own special token: the model has none of it."""
        fields = json.loads(tokenizer.backend_tokenizer.to_str())
        size = len(self.metadata.get("tokenizer.ggml.tokens", []))
        known = [token for token in fields["added_tokens"] if token["id"] < size]
        if len(known) < len(fields["added_tokens"]):
            tokenizer._tokenizer = Tokenizer.from_str(json.dumps(fields | {"added_tokens": known}))

    def _require_whole_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens, types = (self.metadata.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
        for index, (token, kind) in enumerate(zip(tokens, types)):
            if kind in WHOLE_TOKENS and tokenizer.encode(token, add_special_tokens=False) != [index]:
                raise ValueError(f"tokenizer.ggml.token_type says that {token!r} is one token, but it would be cut")

    def _rope_factors(self) -> torch.Tensor | None:
        if ROPE_FREQS not in self._tensors:
            return None
        factors = self._dequantize(ROPE_FREQS)
        return None if (factors == 1).all() else factors

    @cached_property
    def _names(self) -> dict[str, str]:
        """The tensor of each weight; tensors without a place in the model keep their own names."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = get_tensor_name_map(architecture, self.config.num_hidden_layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        tensor_of = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
        weight_of = {tensor: name for name, tensor in tensor_of.items()}
        return {weight_of.get(tensor, tensor): tensor for tensor in self._tensors if tensor != ROPE_FREQS}

    @cached_property
    def shapes(self) -> dict[str, torch.Tensor]:
        """A tensor on the meta device for each weight, float32."""
        sizes = {name: self._tensors[tensor].shape.tolist()[::-1] for name, tensor in self._names.items()}
        return {name: torch.empty(size, dtype=torch.float32, device="meta") for name, size in sizes.items()}

    def read(self, name: str) -> torch.Tensor:
        """A weight, dequantized."""
        weight = self._dequantize(self._names[name])
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        projection = name.split(".")[-2]
        if self.architecture != "llama" or projection not in heads:
            return weight
        # GGUF keeps the rows of a llama's heads as pairs of neighbours, which RoPE rotates; transformers as halves.
        pairs = weight.unflatten(0, (heads[projection], -1, 2))
        return pairs.transpose(1, 2).reshape(weight.shape).contiguous()

    def _dequantize(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{name} of {self.path} is of a type that gguf cannot dequantize: {error}.") from error
        return torch.from_numpy(np.array(values, dtype=np.float32))


def known_splits() -> Container[str]:
    """The splits that transformers can rebuild; none in versions that do not ask for the name."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return ()
    return GGUF_PRE_TOKENIZER_SPLITS


class _Fields:
    """The keys of an architecture, each taken once; what is left at the end has no use."""

    def __init__(self, metadata: dict[str, Any], architecture: str):
        self._prefix = f"{architecture}."
        self._left = {
            key.removeprefix(self._prefix): value for key, value in metadata.items() if key.startswith(self._prefix)
        }
        for name in DESCRIPTIVE_FIELDS:
            self._left.pop(name, None)

    def take(self, name: str, default: Any = None) -> Any:
        value = self._left.pop(name, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                self.refuse(name, value, "it differs between layers")
            value = value[0]
        if value is None:
            raise ValueError(f"The GGUF file has no {self._prefix}{name}: it is incomplete.")
        return value

    def expect(self, name: str, expected: float) -> None:
        value = self.take(name, expected)
        if not math.isclose(value, expected, rel_tol=1e-5):
            self.refuse(name, value, f"it must be {expected}")

    def refuse(self, name: str, value: Any, reason: str) -> None:
        raise ValueError(f"Cannot convert a GGUF file with {self._prefix}{name} = {value}: {reason}.")

    def refuse_the_rest(self) -> None:
        for name, value in self._left.items():
            if not says_nothing(name, value):
                self.refuse(name, value, "Infini-attention has nothing of the kind, or the key is not known")


def _rope_parameters(fields: _Fields, positions: int) -> dict[str, Any]:
    """What transformers calls the keys of `<architecture>.rope`, with llama.cpp's defaults for those not there."""
    theta = fields.take("rope.freq_base", ROPE_THETA)
    kind = fields.take("rope.scaling.type", "linear")
    factor = fields.take("rope.scaling.factor", 0.0) or fields.take("rope.scale_linear", 0.0) or 1.0
    # It multiplies what YaRN gives.
    attention = fields.take("rope.scaling.attn_factor", 1.0)
    original = fields.take("rope.scaling.original_context_length", positions)
    parameters = {"rope_theta": theta}
    if kind == "none":
        factor = 1.0
    elif kind == "yarn":
        fields.expect("rope.scaling.yarn_ext_factor", 1.0)
        parameters |= {
            "original_max_position_embeddings": original,
            "beta_fast": fields.take("rope.scaling.yarn_beta_fast", BETA_FAST),
            "beta_slow": fields.take("rope.scaling.yarn_beta_slow", BETA_SLOW),
        }
        stock = 0.1 * math.log(max(factor, 1.0)) + 1.0
        # llama.cpp's converter writes down the model's own attention_factor here.
        attention *= fields.take("rope.scaling.yarn_attn_factor", stock)
        if not math.isclose(attention, stock, rel_tol=1e-5):
            parameters["attention_factor"] = attention
    elif kind != "linear":
        fields.refuse("rope.scaling.type", kind, 'supported are "none", "linear" and "yarn"')
    if "attention_factor" not in parameters and factor == 1.0:
        kind = "default"
        parameters = {"rope_theta": theta}
    if kind != "yarn" and attention != 1.0:
        fields.refuse("rope.scaling.attn_factor", attention, 'it has a meaning for "yarn" alone')
    return {"rope_type": kind, **({} if kind == "default" else {"factor": factor}), **parameters}


def llama3_parameters(config: PreTrainedConfig, factors: torch.Tensor) -> dict[str, Any]:
    """
    The scaling of Llama 3.1 that divides the frequencies of RoPE by given factors: by one number at long wavelengths,
    not at all at short ones, and by what is between the two for wavelengths between two edges.

    The edges count in units of an original length that cancels out. It is chosen so that the lower edge is at 1, as
    in all Llamas.

    Args:
        config: of the model, without this scaling.
        factors: `(head_dim / 2,)`, float32.

    Raises:
        ValueError: if no scaling of this kind has these factors.
    """
    parameters = config.rope_parameters
    if parameters["rope_type"] == "default" and factors.shape == (config.head_dim // 2,) and _are_positive(factors):
        for candidate in _llama3_candidates(config, factors.double()):
            scaled = config.__class__(**{**config.to_dict(), "rope_parameters": candidate})
            expected = _frequencies(config) / factors.double()
            if torch.allclose(
                ROPE_INIT_FUNCTIONS[candidate["rope_type"]](scaled)[0].double(), expected, rtol=1e-5, atol=0
            ):
                return candidate
    raise ValueError(
        f"Cannot convert a GGUF file with the tensor {ROPE_FREQS}: its {factors.numel()} factors, beside a rope_type "
        f'of "{parameters["rope_type"]}", are not those of a scaling as in Llama 3.1.'
    )


def _are_positive(factors: torch.Tensor) -> bool:
    return bool((factors.isfinite() & (factors > 0)).all())


def _frequencies(config: PreTrainedConfig) -> torch.Tensor:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return config.rope_parameters["rope_theta"] ** -exponents


def _llama3_candidates(config: PreTrainedConfig, factors: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Scalings that may have these factors, of which at most the fade between two edges is open."""
    theta, factor = config.rope_parameters["rope_theta"], factors.max().item()
    if torch.allclose(factors, factors[0]):
        yield {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        return
    waves, shares = _frequencies(config) / (2 * math.pi), (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (shares > 1e-5) & (shares < 1 - 1e-5)
    if between.sum() > 1:
        # Between the edges the share of the unscaled frequency is a line over the inverse wavelength.
        (x, y), (first, last) = (waves[between], shares[between]), (0, -1)
        slope = (y[first] - y[last]) / (x[first] - x[last])
        edges = [(x[last] - y[last] / slope, x[last] + (1 - y[last]) / slope)]
    elif between.any():
        wave, share = waves[between].item(), shares[between].item()
        edges = [(wave / (1 + (ratio - 1) * share), ratio * wave / (1 + (ratio - 1) * share)) for ratio in EDGE_RATIOS]
    else:
        wave = (waves[shares >= 0.5].min() * waves[shares < 0.5].max()).sqrt().item()
        edges = [(wave / ratio**0.5, wave * ratio**0.5) for ratio in EDGE_RATIOS]
    for low, high in edges:
        if not 0 < low < high:
            continue
        length = round(1 / float(low)) or 1
        exact = {"low_freq_factor": float(length * low), "high_freq_factor": float(length * high)}
        rounded = {name: float(f"{value:.4g}") for name, value in exact.items()}
        for bounds in (rounded, exact):
            yield {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                **bounds,
                "original_max_position_embeddings": length,
            }
