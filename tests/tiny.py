"""Tiny models whose random weights let every term of the equations count, and hypothesis strategies."""

import torch
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from modeling_infini import InfiniConfig, InfiniForCausalLM


VOCABULARY = 31


def tiny_config(**fields) -> InfiniConfig:
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "segment_length": 5,
        "max_position_embeddings": 64,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return InfiniConfig(**{**defaults, **fields})


def randomize(model, seed: int = 0):
    """Weights far from their initial values, norms and gates included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            scale = 0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(noise * scale + (1.0 if "norm" in name else 0.0))
    return model


def tiny_model(dtype=torch.float32, seed: int = 0, **fields) -> InfiniForCausalLM:
    return randomize(InfiniForCausalLM(tiny_config(**fields)), seed).to(dtype).eval()


def compute_norm_and_rope_in_float64(monkeypatch) -> None:
    """The stock norm and RoPE compute in float32; with this they compute in the dtype of their input."""

    def norm(self, states):
        return self.weight * states / (states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def rope(self, states, position_ids):
        dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        inv_freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=states.device) / dim)
        angles = position_ids[..., None].double() * inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rope)


def float64_weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().double() for name, weight in model.state_dict().items()}


def random_ids(*shape, seed: int = 0) -> torch.Tensor:
    """On the default device, the same on all of them."""
    ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return ids.to(torch.get_default_device())


def seeded(seed: int) -> torch.Generator:
    """A generator of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


MODES = [
    {"local_attention": "segment"},
    {"local_attention": "sliding"},
    {"local_attention": "sliding", "num_sink_tokens": 2},
]


# Each option of the configuration that adds a parameter or another way to compute, with grouped queries. Of two
# layers, one has a memory.
EVERY_OPTION = {
    "memory_layers": [1],
    "memory_feature_map": "exp",
    "token_gates": True,
    "num_memory_slots": 3,
    "slot_layers": [0, 1],
    "local_attention": "sliding",
    "num_sink_tokens": 2,
    "use_mem_delta_rule": True,
    "learned_delta_update": True,
    "memory_norm_init_scale": 1.5,
    "memory_write_gate": True,
    "qk_norm": True,
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
}

# Without what is refused where sequences are split, and in `"segment"`.
EVERY_OPTION_BUT_SLOTS = {**EVERY_OPTION, "num_memory_slots": 0, "slot_layers": None}


@st.composite
def config_fields(draw, min_segment_length: int = 1, max_segment_length: int = 6):
    """Both rules, both local modes, grouped queries of 1, 2 and all heads, short segments, layers without either."""
    segment_length = draw(st.integers(min_segment_length, max_segment_length))
    local_attention = draw(st.sampled_from(["segment", "sliding"]))
    sinks = draw(st.integers(0, min(3, segment_length))) if local_attention == "sliding" else 0
    slots = draw(st.sampled_from([0, 1, 3, 7])) if local_attention == "sliding" else 0
    return {
        "segment_length": segment_length,
        "local_attention": local_attention,
        "num_sink_tokens": sinks,
        "use_mem_delta_rule": draw(st.booleans()),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "qk_norm": draw(st.booleans()),
        "learned_delta_update": draw(st.booleans()),
        "memory_norm_init_scale": draw(st.sampled_from([None, 1.5])),
        "memory_write_gate": draw(st.booleans()),
        "memory_layers": draw(st.sampled_from([None, [0], [1], []])),
        "memory_feature_map": draw(st.sampled_from(["elu", "exp"])),
        "token_gates": draw(st.booleans()),
        "num_memory_slots": slots,
        "slot_layers": draw(st.sampled_from([None, [0], [1]])) if slots else None,
    }


def hurting_lengths(segment_length: int):
    """Lengths around the boundaries of segments."""
    n = segment_length
    return st.sampled_from(sorted({1, max(1, n - 1), n, n + 1, 2 * n - 1, 2 * n, 2 * n + 1, 3 * n + 2}))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest of the expected values."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
