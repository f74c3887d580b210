"""Imports models of the package infini-transformer-pytorch (0.2.1, by Phil Wang)."""

import os
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from einops import rearrange
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_infini import InfiniConfig, InfiniForCausalLM

from .checkpoints import read_pickle, require_float, require_state_dict


# Its rotary embeddings are always these, whatever the model.
ROPE_THETA = 10000.0

# Where its gates start.
HEAD_GATE_INIT_VALUE = 10.0

# It divides by max(|x|, 1e-12); this is the same lower bound on the mean square, times the width.
SQUARED_NORM_EPS = 1e-24

NOT_THEIRS = "The state dict is not one of infini-transformer-pytorch 0.2.1"


def load_lucidrains(
    source: str | os.PathLike | Mapping[str, torch.Tensor],
    *,
    segment_length: int,
    use_mem_delta_rule: bool = False,
) -> InfiniForCausalLM:
    """
    A model with the weights of an `InfiniTransformer`, whose logits equal those that it gives over segments of
    `segment_length` tokens with `return_new_memories=True`.

    Everything is represented: RMS-norm without epsilon, the feed-forward's gelu and biases, the biased head, gates,
    both rules, and `learned_delta_update`. Rotary dimensions are reordered from its pairs of neighbours to Llama's
    halves, which neither attention nor memory notices. The model has the dtype that holds all weights.

    Args:
        source: state dict of an `InfiniTransformer` or `InfiniTransformerWrapper`, or the file that it was saved in
            (`.safetensors`, or what `torch.load(weights_only=True)` reads).
        segment_length: as given to the wrapper; the weights don't tell.
        use_mem_delta_rule: as given to the `InfiniTransformer`; the weights don't tell.

    Raises:
        ValueError: if `source` is not such a state dict; the message names a weight.
    """
    weights = dict(_state_dict(source))
    try:
        config = _config(weights, segment_length=segment_length, use_mem_delta_rule=use_mem_delta_rule)
        converted = _converted(weights, config)
        dtype = reduce(torch.promote_types, (w.dtype for name, w in converted.items() if "head_gates" not in name))
        model = InfiniForCausalLM._from_config(config, dtype=dtype)
        missing, unexpected = model.load_state_dict(converted, strict=False)
    except KeyError as error:
        raise ValueError(f"{NOT_THEIRS}: {error} is missing.") from error
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    # Of shapes that do not go together.
    except (RuntimeError, ArithmeticError, IndexError, ValueError) as error:
        raise ValueError(f"{NOT_THEIRS}: {error}") from error
    if missing or unexpected or weights:
        name = [*missing, *unexpected, *weights][0]
        raise ValueError(f"{NOT_THEIRS}: {name} does not fit.")
    return model


def _state_dict(source: str | os.PathLike | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.is_dir():
            raise FileNotFoundError(f"{path} is a folder. Name the file in it that holds the state dict.")
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            source = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is incomplete or damaged ({error}).") from error
    require_state_dict(source, "The source")
    # The wrapper holds the model under this name.
    weights = {name.removeprefix("model."): weight for name, weight in source.items()}
    if "token_emb.weight" not in weights:
        raise ValueError(
            "The source is no state dict of an InfiniTransformer: it has no token_emb.weight, but "
            f"{', '.join(list(weights)[:5])}. Save `model.state_dict()` itself."
        )
    for name, weight in weights.items():
        require_float(name, weight)
    return weights


def _config(weights: Mapping[str, torch.Tensor], **fields) -> InfiniConfig:
    vocab_size, hidden_size = weights["token_emb.weight"].shape
    layers = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("layers.")), default=0)
    heads = weights["layers.0.0.fastweight_mem.head_gates"].shape[0]
    return InfiniConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=weights["layers.0.1.proj_out.weight"].shape[1],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=weights["layers.0.0.to_out.weight"].shape[1] // heads,
        hidden_act="gelu",
        rms_norm_eps=SQUARED_NORM_EPS / hidden_size,
        mlp_bias=True,
        lm_head_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=fields["segment_length"],
        head_gate_init_value=HEAD_GATE_INIT_VALUE,
        converted_from={"package": "infini-transformer-pytorch"},
        learned_delta_update="layers.0.0.to_learned_delta_update_weights.0.weight" in weights,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )


def _converted(weights: dict[str, torch.Tensor], config: InfiniConfig) -> dict[str, torch.Tensor]:
    """The state dict of an `InfiniForCausalLM`; what is used is taken out of `weights`."""
    converted = {
        "model.embed_tokens.weight": weights.pop("token_emb.weight"),
        "model.norm.weight": weights.pop("norm.gamma"),
        "lm_head.weight": weights.pop("to_logits.weight"),
        "lm_head.bias": weights.pop("to_logits.bias"),
    }
    for layer in range(config.num_hidden_layers):
        ours, attention, feed_forward = f"model.layers.{layer}", f"layers.{layer}.0", f"layers.{layer}.1"
        _check_frequencies(weights.pop(f"{attention}.rotary_emb.freqs"), config)
        queries, keys, values = weights.pop(f"{attention}.to_qkv.weight").chunk(3)
        # Its feed-forward is proj_out(gelu(second half) * first half).
        up_weight, gate_weight = weights.pop(f"{feed_forward}.proj_in.weight").chunk(2)
        up_bias, gate_bias = weights.pop(f"{feed_forward}.proj_in.bias").chunk(2)
        converted |= {
            f"{ours}.input_layernorm.weight": weights.pop(f"{attention}.norm.gamma"),
            f"{ours}.self_attn.q_proj.weight": _halves(queries, config.head_dim),
            f"{ours}.self_attn.k_proj.weight": _halves(keys, config.head_dim),
            f"{ours}.self_attn.v_proj.weight": values,
            f"{ours}.self_attn.o_proj.weight": weights.pop(f"{attention}.to_out.weight"),
            f"{ours}.self_attn.head_gates.weight": weights.pop(f"{attention}.fastweight_mem.head_gates").float()
            / config.head_gate_scale,
            f"{ours}.post_attention_layernorm.weight": weights.pop(f"{feed_forward}.norm.gamma"),
            f"{ours}.mlp.up_proj.weight": up_weight,
            f"{ours}.mlp.up_proj.bias": up_bias,
            f"{ours}.mlp.gate_proj.weight": gate_weight,
            f"{ours}.mlp.gate_proj.bias": gate_bias,
            f"{ours}.mlp.down_proj.weight": weights.pop(f"{feed_forward}.proj_out.weight"),
            f"{ours}.mlp.down_proj.bias": weights.pop(f"{feed_forward}.proj_out.bias"),
        }
        if config.learned_delta_update:
            # It learns the share 1 - beta that is NOT written, and 1 - sigmoid(x) = sigmoid(-x).
            strength = weights.pop(f"{attention}.to_learned_delta_update_weights.0.weight")
            converted[f"{ours}.self_attn.memory.write_strength.weight"] = -strength
    return converted


def _halves(projection: torch.Tensor, head_dim: int) -> torch.Tensor:
    """From RoPE over pairs of neighbours to Llama's over halves; the memory sees q and k reordered alike."""
    return rearrange(projection, "(h d two) c -> (h two d) c", two=2, d=head_dim // 2)


def _check_frequencies(frequencies: torch.Tensor, config: InfiniConfig) -> None:
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    if not torch.allclose(frequencies.float(), ROPE_THETA**-exponents, rtol=1e-2):
        raise ValueError(
            "rotary_emb.freqs are not the default ones (theta 10000): infini-transformer-pytorch 0.2.1 has no others."
        )
