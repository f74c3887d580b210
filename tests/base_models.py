"""Tiny base models, made by transformers' own classes."""

import torch
from tiny import randomize
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

# Each architecture, and each variant of it that changes the conversion.
VARIANTS = {
    "llama": ("llama", {}),
    "llama-tied-head_dim": ("llama", {"tie_word_embeddings": True, "head_dim": 8}),
    "llama-biases-rope": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 9, "head_dim": 10}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-head_dim-yarn": ("qwen2", {"head_dim": 8, "rope_parameters": YARN_ROPE}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-biases": ("qwen3", {"head_dim": 6, "attention_bias": True, "num_key_value_heads": 1}),
}


def base_model(variant: str = "llama", dtype: torch.dtype = torch.float32, **fields) -> PreTrainedModel:
    model_type, own_fields = VARIANTS[variant]
    config_class, model_class = CLASSES[model_type]
    config = config_class(**{**SIZES, **own_fields, **fields})
    return randomize(model_class(config)).to(dtype).eval()
