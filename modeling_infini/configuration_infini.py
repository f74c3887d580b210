"""Configuration of Infini-attention models."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@strict
class InfiniConfig(LlamaConfig):
    r"""
    Every field of [`LlamaConfig`], and those of the compressive memory.

    Args:
        segment_length (`int`, defaults to 2048):
            Number of tokens N in a segment. A segment is written to the memory when it is complete.
        use_mem_delta_rule (`bool`, defaults to `False`):
            Write with the delta rule, which stores only what the memory does not return already, instead of the
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

    Raises:
        ValueError: for a combination of fields that has no meaning; the message names the field and the rule.
    """

    model_type = "infini"
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.self_attn.head_gates.weight": "colwise",
        "layers.*.self_attn.head_gates": "local_params",
    }

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

    @property
    def is_sliding(self) -> bool:
        """Whether local attention is a sliding window (with or without sinks)."""
        return self.local_attention == "sliding"

    @property
    def longest_distance(self) -> int:
        """Upper bound, in tokens, of the distance between a token and what it sees locally."""
        return 2 * self.segment_length + self.num_sink_tokens if self.is_sliding else self.segment_length

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Validates the architecture of the config."""
        # A head_dim of its own (Qwen3) frees hidden_size from being a multiple of the number of heads.
        if self.head_dim is None or self.head_dim % 2 != 0:
            raise ValueError(f"head_dim={self.head_dim} must be an even number: RoPE rotates pairs of dimensions.")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.segment_length < 1:
            raise ValueError(f"segment_length={self.segment_length} must be at least 1.")
        if not 0 <= self.num_sink_tokens <= self.segment_length:
            raise ValueError(
                f"num_sink_tokens={self.num_sink_tokens} must be between 0 and segment_length={self.segment_length}."
            )
        if self.num_sink_tokens > 0 and not self.is_sliding:
            raise ValueError(
                f'num_sink_tokens={self.num_sink_tokens} needs local_attention="sliding"; with '
                f'local_attention="{self.local_attention}" it must be 0.'
            )
        if self.memory_eps <= 0:
            raise ValueError(f"memory_eps={self.memory_eps} must be positive: it bounds a denominator.")
        if self.head_gate_scale <= 0:
            raise ValueError(f"head_gate_scale={self.head_gate_scale} must be positive.")
        self._validate_rope()

    def _validate_rope(self):
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in SUPPORTED_ROPE_TYPES:
            raise ValueError(
                f'rope_type="{rope_type}" is not supported: its angles depend on more than the distance within a '
                f"window. Supported: {', '.join(SUPPORTED_ROPE_TYPES)}."
            )
        if rope_type == "dynamic" and self.longest_distance > self.max_position_embeddings:
            raise ValueError(
                f'rope_type="dynamic" changes its frequencies beyond max_position_embeddings='
                f"{self.max_position_embeddings}, but local attention reaches {self.longest_distance} tokens. "
                f"Choose a smaller segment_length={self.segment_length}."
            )


__all__ = ["InfiniConfig"]
