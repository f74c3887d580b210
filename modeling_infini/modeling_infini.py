"""
Infini-attention for transformers: a Llama whose attention is local, plus a compressive memory of constant size.

    input_ids -> streams -> per layer: q, k, v -> local attention ┐
                                              └> memory read     ┴> gate -> output
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from transformers import AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import (
    TransformersKwargs,
    auto_docstring,
    can_return_tuple,
    find_adapter_config_file,
    is_peft_available,
)
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, InfiniCache, Past, one_past
from .cache_layer import LOSES_GRADIENTS, LayerPast, TokenStates
from .configuration_infini import SHARED_BY_HEADS, SHARED_OUT_BY_HEADS, InfiniConfig, is_infini_config
from .fingerprint import WeightsId, name_of
from .generation_infini import InfiniGenerationMixin
from .gpu_kernels import fused_norm, fused_read, has_kernels
from .local_attention import (
    FlashWindow,
    RotaryAngles,
    angle_table,
    angles_of_call,
    attend_by_one,
    local_attention_mask,
    rotate,
)
from .memory import FEATURE_MAPS, MemoryState, log_features, memory_dtype, read_memory
from .memory_slots import rounded
from .streams import (
    DecodeLayout,
    Layout,
    columns_tokens_last,
    last_tokens,
    require_ids,
    split_call,
    take,
    taken_packing,
    targets,
    warn_of_lost_start,
)


# Of `from_pretrained`: where files are.
DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")

# A call without gradients is read in pieces of about this many columns: what a CPU holds near.
PIECE_TOKENS = 2048
# On a GPU, pieces of so many tokens of all rows: less would leave it waiting for the next operation.
GPU_PIECE_TOKENS = 16_384

ARGUMENTS = r"""
attention_mask (`torch.Tensor` of shape `(batch, columns)`, *optional*):
    0 for padding, wherever it stands, and 1 for tokens, or the numbers 1, 2, ... of packed documents, each of
    which is a stream; of a longer history, only the last columns belong to this call.
position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
    Serve only to find where packed documents start: a new stream starts at each token whose id is 0. Others
    must grow from token to token.
past_key_values ([`InfiniCache`], *optional*):
    What was read so far; this call is read into it. Or what other processes read of the sequence.
cache ([`InfiniCache`], *optional*):
    `past_key_values`, by the name that transformers has for it from 5.24 on.
chunk_length (`int`, *optional*):
    The number of columns that are read at a time where no gradient is asked for; if left out, about 2,048, on a GPU
    16,384 tokens of all rows together. Not in a compiled call, which is read at once.
columns_to_keep (`torch.LongTensor` of shape `(batch or 1, columns)`, *optional*):
    The columns whose last hidden states are returned; all of them if left out.
tokens_last (`bool`, *optional*, defaults to `False`):
    Whether the logits come with each row's padding first and its tokens last, wherever padding stands in the
    inputs: the last column is then that of the last token that the row has read. An int `logits_to_keep`
    counts these columns. Nothing else changes its order. `generate()` asks for it.
"""


class FormerNames(WeightRenaming):
    """
    Loads the parameters of the memory also by the names that they had as parts of the attention, `memory_query_norm`,
    `memory_key_norm`, `memory_write_gate` and `write_strength`; saves them by those that they have in its memory.
    """

    __slots__ = ()

    def reverse_transform(self) -> "FormerNames":
        # In a model that is saved it finds nothing to rename.
        return self


FORMER_NAMES = FormerNames(r"self_attn\.(?:memory_|(?=write_strength\.))", "self_attn.memory.")
# Each folder with remote code imports this file anew.
register_checkpoint_conversion_mapping(InfiniConfig.model_type, [FORMER_NAMES], overwrite=True)


def _rename_former_names(model: nn.Module, state_dict: dict, prefix: str, *args) -> None:
    """For `load_state_dict`, which knows no conversions: by it the Trainer goes on from a checkpoint."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[FORMER_NAMES.rename_source_key(name)[0]] = state_dict.pop(name)


class WeightPerHead(nn.Module):
    """A learned number for each head, at least in float32."""

    def __init__(self, num_heads: int, initial_weight: float):
        super().__init__()
        self.initial_weight = initial_weight
        # Where weights stay on disk, transformers reads them in the dtype that they are made in.
        dtype = memory_dtype(torch.get_default_dtype())
        self.weight = nn.Parameter(torch.full((num_heads,), initial_weight, dtype=dtype))


class InfiniHeadGates(WeightPerHead):
    """
    One gate per query head: the share of local attention, `sigmoid(head_gate_scale * weight)`, in the mix with the
    memory. In the paper (arXiv 2404.07143, eq. 10) the sigmoid is the share of the memory instead.
    """

    def __init__(self, config: InfiniConfig):
        super().__init__(config.num_attention_heads, config.head_gate_init_value / config.head_gate_scale)
        self.scale = config.head_gate_scale

    def forward(self, token_logits: torch.Tensor | int = 0) -> torch.Tensor:
        """
        The share of local attention, `(num_attention_heads,)`, at least in float32; or `(..., num_attention_heads)`,
        with logits of this shape that tokens add.
        """
        return self.share(self.weight, token_logits)

    def share(self, weight: torch.Tensor, token_logits: torch.Tensor | int = 0) -> torch.Tensor:
        return torch.sigmoid(self.scale * weight.to(memory_dtype(weight.dtype)) + token_logits)


class InfiniMemoryNorm(WeightPerHead):
    """
    RMS-norm of each head's queries or keys on their way to the memory, times a learned scale: exp(weight) x / rms(x).

    As for CLIP's temperature (arXiv 2103.00020), the logarithm is what is learned: one step of Adam changes a scale by
    the same ratio wherever it stands.
    """

    def __init__(self, config: InfiniConfig, num_heads: int):
        super().__init__(num_heads, math.log(config.memory_norm_init_scale))
        self.eps = config.rms_norm_eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., heads, head_dim)` -> the same, at least in float32."""
        states = states.to(memory_dtype(states.dtype))
        normed = nn.functional.rms_norm(states, states.shape[-1:], eps=self.eps)
        return normed * self.weight.to(states.dtype).exp().unsqueeze(-1)


class InfiniFeatureMap(nn.Module):
    """A learned map of each head in front of exponential features, at least in float32."""

    # Of the identity: with less, the features tell keys apart less than training can mend in its first steps.
    INITIAL_SCALE = 0.7

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        dtype = memory_dtype(torch.get_default_dtype())
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim, dtype=dtype))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., heads, head_dim)` to [`memory.log_features`], `(..., heads, 2 head_dim)`."""
        return log_features(states, self.weight, self.bias)


class InfiniWriteGate(nn.Linear):
    """
    How much of each token is remembered: the logits W x + b of the gates g, one per KV head. No more than a linear
    layer, so that what adapts, quantizes or shards such layers is right here.

    log g, by [`log_write_gates`], is added to a key where sigma is exponential, and so multiplies what the
    token adds to M and z: the input gate of an LSTM, for a memory whose reads are relative to all that was written.
    """

    INITIAL_LOGIT = 3.0


class InfiniTokenGate(nn.Linear):
    """What the token that reads adds to the logits of the head gates: W x, one per query head; at first, nothing."""


class InfiniSlotScore(nn.Linear):
    """The score W x of a token, by which it stays in a slot or not; at first the same for all."""


def in_dtype_of(linear: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    """Hidden states for a linear layer that may be in a wider dtype than the model: the memory alone was trained."""
    dtype = linear.weight.dtype
    return hidden_states.to(dtype) if dtype.is_floating_point else hidden_states


def of_own_heads(logits: torch.Tensor) -> torch.Tensor:
    """Logits `(..., heads)`, at least in float32; those of its own heads in each process of tensor parallelism."""
    # DTensors have no backward of logsigmoid.
    logits = logits.to_local() if isinstance(logits, DTensor) else logits
    return logits.to(memory_dtype(logits.dtype))


def log_write_gates(logits: torch.Tensor) -> torch.Tensor:
    """log sigmoid of the logits of write gates `(..., kv_heads)`, at least in float32."""
    return nn.functional.logsigmoid(of_own_heads(logits))


class InfiniMemory(nn.Module):
    """
    How a layer writes and reads its memory. What it has written is not here: M and z are states of the cache.

    Modules, where the configuration asks for them: `query_norm`, `key_norm`; `query_map`, `key_map` of `"exp"`;
    `write_gate`; `token_gate`; and `write_strength`, whose sigmoid is how strongly a token is written.
    """

    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.config = config
        if config.learned_delta_update:
            self.write_strength = nn.Linear(config.hidden_size, config.num_key_value_heads, bias=False)
        if config.memory_norm_init_scale is not None:
            self.query_norm = InfiniMemoryNorm(config, config.num_attention_heads)
            self.key_norm = InfiniMemoryNorm(config, config.num_key_value_heads)
        if config.memory_feature_map == "exp":
            self.query_map = InfiniFeatureMap(config.num_attention_heads, config.head_dim)
            self.key_map = InfiniFeatureMap(config.num_key_value_heads, config.head_dim)
        if config.token_gates:
            self.token_gate = InfiniTokenGate(config.hidden_size, config.num_attention_heads, bias=False)
        if config.memory_write_gate:
            self.write_gate = InfiniWriteGate(config.hidden_size, config.num_key_value_heads)

    def token_states(self, hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> TokenStates:
        """
        What the tokens of a call write.

        Args:
            hidden_states: `(B, T, hidden_size)`, which gates and strengths depend on.
            keys, values: `(B, T, kv_heads, head_dim)`, keys without RoPE.
        """
        strength = None
        if self.config.learned_delta_update:
            strength = self.write_strength(in_dtype_of(self.write_strength, hidden_states))
            strength = strength.to(memory_dtype(hidden_states.dtype)).sigmoid()
        memory_keys = keys if self.config.memory_norm_init_scale is None else self.key_norm(keys)
        if self.config.memory_feature_map == "exp":
            memory_keys = self.key_map(memory_keys)
        if self.config.memory_write_gate:
            memory_keys = memory_keys + log_write_gates(
                self.write_gate(in_dtype_of(self.write_gate, hidden_states))
            ).unsqueeze(-1)
        return TokenStates(keys, values, None if memory_keys is keys else memory_keys, strength)

    def forward(
        self, local: torch.Tensor, queries: torch.Tensor, memory: MemoryState, local_share: torch.Tensor
    ) -> torch.Tensor:
        """
        g * local + (1 - g) * read.

        Args:
            local: output of local attention, `(G, length, heads, head_dim)`.
            queries: without RoPE, of the same shape.
            memory: from before each segment, `(G, kv_heads, ...)`.
            local_share: g, `(G or 1, length or 1, heads)`; 1 in a stream's first segment.
        """
        if has_kernels(queries):
            is_exponential = self.config.memory_feature_map == "exp"
            queries = self.query_states(queries)
            return fused_read(local, queries, memory, local_share, self.config.memory_eps, is_exponential)
        read = self.read(queries, memory)
        memory_share = (1 - local_share.to(read.dtype)).unsqueeze(-1)
        # From `local`, whose strides the result takes: they are those that the output projection wants.
        return torch.lerp(local.to(read.dtype), read, memory_share).to(local.dtype)

    def read(self, queries: torch.Tensor, memory: MemoryState) -> torch.Tensor:
        """What queries read, before the gate; arguments as of `forward`. Groups of query heads share a KV head's."""
        queries = self.query_states(queries)
        grouped = rearrange(queries, "g l (h r) d -> g h (r l) d", h=memory.matrix.shape[1]).to(memory.matrix.dtype)
        features = FEATURE_MAPS[self.config.memory_feature_map](grouped.contiguous())
        read = read_memory(features, memory, self.config.memory_eps)
        return rearrange(read, "g h (r l) d -> g l (h r) d", l=queries.shape[1])

    def query_states(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries `(..., heads, head_dim)` as the feature map gets them."""
        if self.config.memory_norm_init_scale is not None:
            queries = self.query_norm(queries)
        return self.query_map(queries) if self.config.memory_feature_map == "exp" else queries


class InfiniRMSNorm(LlamaRMSNorm):
    """Llama's, in one pass on a GPU; in float32, where a sum in another order would show, as Llama has it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.itemsize == 2 and has_kernels(hidden_states):
            return fused_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class InfiniAttention(nn.Module):
    """Local attention with RoPE over segments, mixed by a gate per head with a read of the memory (without RoPE)."""

    def __init__(self, config: InfiniConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        biases = config.projection_biases
        query_dim = config.num_attention_heads * self.head_dim
        key_value_dim = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=biases["qkv_bias"])
        self.k_proj = nn.Linear(config.hidden_size, key_value_dim, bias=biases["qkv_bias"])
        self.v_proj = nn.Linear(config.hidden_size, key_value_dim, bias=biases["qkv_bias"])
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=biases["attention_output_bias"])
        if config.qk_norm:
            self.q_norm = InfiniRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = InfiniRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.has_memory = layer_idx in config.layers_with_memory
        if self.has_memory:
            self.head_gates = InfiniHeadGates(config)
            self.memory = InfiniMemory(config)
        self.has_slots = layer_idx in config.layers_with_slots
        if self.has_slots:
            self.slot_score = InfiniSlotScore(config.hidden_size, 1, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: RotaryAngles,
        attention_mask: torch.Tensor | FlashWindow | None,
        layout: Layout,
        past: LayerPast,
        window_columns: tuple[torch.Tensor, int] | None = None,
        writes_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: `(B, T, hidden_size)`.
            position_embeddings: angles of queries and keys, relative to segments.
            attention_mask: what the queries of each segment see of its window, in the attention backend's format.
            layout: where the call's tokens stand in their streams.
            past: what the layer goes on from.
            window_columns: the column `(G, window)` in each window's slots and the number of columns in all, where
                attention weights are to be returned.
            writes_only: whether the layer is only to write what its tokens leave in `past`.

        Returns:
            `(B, T, hidden_size)`, `None` with `writes_only`; and the weights of local attention
            `(B, heads, T, columns)` if asked for.
        """
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        keys = self.k_proj(hidden_states).view(hidden_shape)
        values = self.v_proj(hidden_states).view(hidden_shape)
        queries = None if writes_only else self.q_proj(hidden_states).view(hidden_shape)
        output, weights = self.attend(
            hidden_states, queries, keys, values, position_embeddings, attention_mask, layout, past, **kwargs
        )
        if output is None:
            return None, None
        # Contiguous, since tensor parallelism takes it for that: the columns may be a slice of the segments' slots.
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        weights = None if window_columns is None or weights is None else _by_column(weights, *window_columns, layout)
        return output, weights

    def attend(
        self,
        hidden_states: torch.Tensor,
        queries: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        position_embeddings: RotaryAngles,
        attention_mask: torch.Tensor | FlashWindow | None,
        layout: Layout,
        past: LayerPast,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        What lies between the projections; arguments as of `forward`, and:

        Args:
            queries, keys, values: as projected, `(B, T, heads, head_dim)`; without queries, the layer only writes.

        Returns:
            `(B, T, heads, head_dim)`, `None` without queries; and the weights of local attention over windows
            `(G, heads, query_length, window)`, if the backend has them.
        """
        if self.config.qk_norm:
            # Under autocast, a norm with float32 weights gives float32.
            keys = self.k_norm(keys).to(values.dtype)
        states = TokenStates(keys, values)
        if self.has_memory:
            states = self.memory.token_states(hidden_states, keys, values)
        if self.has_slots and self.config.num_memory_slots:
            scores = self.slot_score(in_dtype_of(self.slot_score, hidden_states)).to(memory_dtype(hidden_states.dtype))
            # The choice has no gradient. The weights have one of 0, for the reason in `_zero`.
            zero = 0 * scores if torch.is_grad_enabled() else 0
            states = states._replace(slot_scores=rounded(scores) + zero)
        kept = states
        if not self.config.is_sliding:
            # A token is seen at one place alone: its key is kept as it is seen there.
            memory_keys = keys if self.has_memory and states.memory_keys is None else states.memory_keys
            kept = states._replace(keys=rotate(keys, position_embeddings.keys), memory_keys=memory_keys)
        window, memory = past.update(kept, layout)  # type: ignore[arg-type]
        if queries is None:
            return None, None

        if self.config.qk_norm:
            queries = self.q_norm(queries)
        queries = layout.to_segments(queries)
        window_keys = window.keys
        if window.slot_places is not None:
            attention_mask = local_attention_mask(self.config, layout, hidden_states, window.slot_places)
            window_keys = rotate(window_keys, position_embeddings.keys_with_slots)
        elif self.config.is_sliding:
            window_keys = rotate(window_keys, position_embeddings.keys)
        local_queries = rotate(queries, position_embeddings.queries)
        if isinstance(attention_mask, FlashWindow):
            output, weights = attention_mask.attend(local_queries, window_keys, window.values, self.scaling), None
        elif self._has_one_query(local_queries, attention_mask):
            output = attend_by_one(local_queries, window_keys, window.values, attention_mask, self.scaling)
            weights = None
        else:
            attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = attention_interface(
                self,
                local_queries.transpose(1, 2),
                window_keys.transpose(1, 2),
                window.values.transpose(1, 2),
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        if memory is not None:
            local_share = self._local_share(hidden_states, layout)
            output = self.memory(output, queries, memory, local_share)
        if (self.has_memory or self.has_slots) and torch.is_grad_enabled():
            output = output + self._zero(states, queries, hidden_states, layout, memory)
        return layout.to_columns(output), weights

    def _has_one_query(self, queries: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether sdpa need not repeat keys and values."""
        is_sdpa = self.config._attn_implementation == "sdpa" and attention_mask is not None
        return is_sdpa and queries.shape[1] == 1 and not (self.training and self.attention_dropout)

    def _local_share(self, hidden_states: torch.Tensor, layout: Layout) -> torch.Tensor:
        """g, `(G or 1, query_length or 1, heads)`; 1 in the first segments of streams."""
        if self.config.token_gates:
            token_gate = self.memory.token_gate
            token_logits = of_own_heads(token_gate(in_dtype_of(token_gate, hidden_states)))
            share = layout.to_segments(self.head_gates(token_logits))
        else:
            share = self.head_gates().view(1, 1, -1)
        return torch.where((layout.segment_index > 0).view(-1, 1, 1), share, 1.0)

    def _zero(
        self,
        states: TokenStates,
        queries: torch.Tensor,
        hidden_states: torch.Tensor,
        layout: Layout,
        memory: MemoryState | None,
    ) -> torch.Tensor | int:
        """
        Adds 0, so that what this call does not use has a gradient of 0 and not none: processes that train on texts of
        different lengths exchange gradients of the same parameters. What is written may be read in a later call alone.
        """
        unused = [states.memory_keys, states.write_strength, states.slot_scores]
        if self.has_memory and memory is None:
            memory_queries = self.memory.query_states(queries)
            unused += [self._local_share(hidden_states, layout), None if memory_queries is queries else memory_queries]
        return 0 * sum(of_memory.sum() for of_memory in unused if of_memory is not None)


def _by_column(weights: torch.Tensor, columns: torch.Tensor, num_columns: int, layout: Layout) -> torch.Tensor:
    """Attention weights over windows, `(G, heads, length, window)`, as `(B, heads, T, num_columns)`."""
    by_column = weights.new_zeros(*weights.shape[:-1], num_columns)
    by_column = by_column.scatter_add(-1, columns[:, None, None].expand_as(weights), weights)
    return layout.to_columns(by_column.transpose(1, 2)).transpose(1, 2)


def _kept_columns(hidden_states: torch.Tensor, kept: int | torch.Tensor) -> torch.Tensor:
    """Of `(B, T, hidden)`: all columns (0), columns `(C,)` or `(B or 1, C)`, or those of a mask `(B, T)`, flat."""
    if isinstance(kept, int):
        return hidden_states
    if kept.dim() == 2 and kept.dtype != torch.bool:
        return take(hidden_states, kept)
    return hidden_states[kept] if kept.dim() == 2 else hidden_states[:, kept]


class InfiniDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: InfiniConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = InfiniAttention(config, layer_idx)  # type: ignore[assignment]
        self.input_layernorm = InfiniRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = InfiniRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """`(B, T, hidden_size)` -> the same; unchanged where the layer only writes to the cache."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if attended is None:
            return hidden_states
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class SharedOutByHeads(TensorParallelLayer):
    """Parameters whose first dimension is heads: each process computes with those of its own, as plain tensors."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters[param]
        own = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(own, requires_grad=whole.requires_grad)


class SharedByHeads(TensorParallelLayer):
    """
    Parameters that all heads share: whole in each process, which sums the gradients of its own heads with the others'.

    Each backward pass adds the sum to `.grad`. "replicated_with_grad_allreduce" of transformers sums `.grad` itself
    after each backward pass, so that what was accumulated before counts once more.
    """

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        parameters = dict(module._parameters)
        for name, parameter in parameters.items():
            whole = DTensor.from_local(parameter, mesh, [Replicate()], run_check=False)
            module._parameters[name] = whole.to_local(grad_placements=[Partial()])  # type: ignore[assignment]
        try:
            yield
        finally:
            module._parameters.update(parameters)


ALL_PARALLEL_STYLES.register(SHARED_OUT_BY_HEADS, SharedOutByHeads())  # type: ignore[arg-type]
ALL_PARALLEL_STYLES.register(SHARED_BY_HEADS, SharedByHeads())  # type: ignore[arg-type]


@auto_docstring
class InfiniPreTrainedModel(PreTrainedModel):
    config: InfiniConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # An instance says it for its configuration.
    _keep_in_fp32_modules_strict = ["head_gates"]
    _no_split_modules = ["InfiniDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache", "past"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    # Servers ask for it before they put their own attention over paged keys into a model: that would hold no memory.
    _supports_attention_backend = False
    _supports_context_parallel = False
    _can_record_outputs = {"hidden_states": InfiniDecoderLayer, "attentions": InfiniAttention}

    def __init__(self, config: InfiniConfig, *args, **kwargs):
        if not is_infini_config(config):
            raise ValueError(
                f"{type(self).__name__} takes an InfiniConfig, not a {type(config).__name__}. Its method "
                "from_pretrained(folder, segment_length=...) converts a checkpoint; for a new model, make an "
                "InfiniConfig(hidden_size=..., segment_length=..., ...)."
            )
        # from_pretrained sets fields that it is given after the configuration was validated.
        config.validate_architecture()
        if (new_weights := vars(config).pop("_new_weights", None)) is not None:
            self._keys_to_ignore_on_load_missing = {new_weights}
        super().__init__(config, *args, **kwargs)
        kept = config.float32_modules if config.layers_with_memory else []
        self._keep_in_fp32_modules_strict = [name.split(".")[-1] for name in kept]
        self.register_load_state_dict_pre_hook(_rename_former_names)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        As [`PreTrainedModel.from_pretrained`]. The checkpoint of a Llama, Mistral, Qwen2 or Qwen3 is converted while
        it is loaded, as by `convert_to_infini`, whose options of the memory (`segment_length`, ...) are taken then.

        Raises:
            ImportError: if that takes the package that published code comes from, and it is not installed.
            FileNotFoundError, ValueError: as `convert_to_infini`, if the checkpoint cannot be converted.
        """
        source = pretrained_model_name_or_path
        if source is None or is_infini(source, config, kwargs, cls.config_class.model_type):
            return super().from_pretrained(source, *model_args, config=config, **kwargs)
        try:
            from infini_transformers.conversion.while_loading import load_base
        except ImportError as error:
            raise ImportError(
                f"{source} holds no Infini-attention checkpoint. To convert another model's, install "
                "infini-transformers, the package that this code comes from."
            ) from error
        return load_base(cls, super().from_pretrained, source, model_args, config, kwargs)

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if distributed_config is not None and model.config.num_key_value_heads % distributed_config.tp_size:
            raise ValueError(
                f"tp_size={distributed_config.tp_size} does not divide num_key_value_heads="
                f"{model.config.num_key_value_heads}: tensor parallelism gives whole KV heads to each process, as "
                "many to one as to another, with their query heads and their memory. Choose a tp_size that divides "
                "them; fsdp_size may be any number."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def local_shares(self) -> torch.Tensor:
        """
        What the gates give to local attention, `(num_hidden_layers, num_attention_heads)`, at least in float32: 1 in
        layers without memory; without what tokens add to the gates. Where the gates are sharded over processes, each
        of them must call it.
        """
        shares = []
        # By layer, since PEFT keeps the gates that it trains beside the original ones.
        for module in (module for module in self.modules() if isinstance(module, InfiniAttention)):
            if not module.has_memory:
                shares.append(torch.ones(self.config.num_attention_heads))
                continue
            # Of sharded gates, each process has the heads that it runs, or none.
            gate = module.head_gates
            share = gate.share(gate.weight.full_tensor()) if isinstance(gate.weight, DTensor) else gate()
            shares.append(share.cpu())
        return torch.stack(shares)

    def weights_fingerprint(self) -> str | None:
        """
        A hash of the weights that a memory depends on, those of the base model (not of its head): the same in every
        process and on every device, sharded or whole; another one after training, after rounding to another dtype, and
        with other adapters at work. Each process that has a shard must call it.

        Returns:
            The fingerprint; `None` where the weights have none (on the meta device, or quantized by a tool that does
            not say what its tensors are made of).
        """
        return WeightsId.of(self.base_model, anew=True).fingerprint

    def new_cache(self) -> InfiniCache:
        """An empty cache for this model; of the class that its own code knows, also where that is remote code."""
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            # An exported program may return it, so torch has to know what it is made of.
            from transformers.exporters.exporter_dynamo import register_pytree_node

            register_pytree_node(InfiniCache)
        return InfiniCache(self.config)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        try:
            from infini_transformers.conversion.model_card import write_missing_card
        except ImportError:
            # Published code runs without this package. The card is then the one that transformers makes up.
            pass
        else:
            write_missing_card(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, WeightPerHead):
            init.constant_(module.weight, module.initial_weight)
        if isinstance(module, InfiniWriteGate):
            init.constant_(module.bias, InfiniWriteGate.INITIAL_LOGIT)
        if isinstance(module, (InfiniTokenGate, InfiniSlotScore)):
            init.zeros_(module.weight)
        if isinstance(module, InfiniFeatureMap):
            heads, head_dim = module.bias.shape
            init.copy_(module.weight, torch.eye(head_dim).mul(module.INITIAL_SCALE).expand(heads, -1, -1))
            init.zeros_(module.bias)


def require_place(source: str | os.PathLike) -> None:
    """Raises FileNotFoundError for a path that leads to nothing, about which the Hub need not be asked."""
    name = os.fspath(source)
    if not os.path.exists(name) and (name.count("/") > 1 or name.startswith(("/", ".", "~"))):
        home = f" Python does not expand ~: write {os.path.expanduser(name)}." if name.startswith("~") else ""
        raise FileNotFoundError(f"There is no folder or file {name} (seen from {os.getcwd()}).{home}")


def is_infini(
    source: str | os.PathLike,
    config: PreTrainedConfig | str | os.PathLike | None,
    kwargs: dict,
    model_type: str = InfiniConfig.model_type,
) -> bool:
    """Whether a source is for `from_pretrained` of transformers: a checkpoint of another model type is not."""
    if kwargs.get("gguf_file") is not None or os.path.isfile(source) or str(source).endswith(".gguf"):
        return False
    require_place(source)
    place = {name: kwargs[name] for name in ("subfolder", *DOWNLOAD_ARGUMENTS) if kwargs.get(name) is not None}
    fields, _ = PreTrainedConfig.get_config_dict(source, **place)
    if fields:
        return fields.get("model_type") in (model_type, InfiniConfig.model_type)
    if is_peft_available() and (adapter := find_adapter_config_file(str(source), **place)) is not None:
        with open(adapter, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
        # The base's own place, by the same leave to get there.
        of_base = {name: value for name, value in place.items() if name not in ("subfolder", "revision")}
        return bool(base) and is_infini(base, None, of_base, model_type)
    # Weights alone are enough where a configuration is given.
    return config is not None


def _plan_call(past: Past, *arguments) -> Layout:
    return past.plan_call(*arguments)


_plan_outside_of_graphs = torch.compiler.disable(_plan_call)


@auto_docstring
class InfiniModel(InfiniPreTrainedModel):
    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [InfiniDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = InfiniRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False

        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring(custom_args=ARGUMENTS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: InfiniCache | None = None,
        columns_to_keep: torch.Tensor | None = None,
        chunk_length: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        past_key_values = one_past(past_key_values, cache)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal=False is not supported: a memory holds what was read before.")
        for name, argument in kwargs.items():
            if hasattr(argument, "plan_call"):
                raise ValueError(f"{name} is what a call goes on from: pass it as past_key_values.")
        if chunk_length is not None and chunk_length < 1:
            raise ValueError(
                f"chunk_length, prefill_chunk_size in generate(), must be at least 1, got {chunk_length}."
            )
        if input_ids is not None:
            require_ids(input_ids)
        states = input_ids if inputs_embeds is None else inputs_embeds
        shape, length = states.shape[:2], states.shape[1]
        if length == 0:
            raise ValueError(
                "The inputs have no columns: there is nothing to read. An empty prompt can be the BOS token alone."
            )
        if columns_to_keep is not None:
            if columns_to_keep.dim() != 2 or columns_to_keep.dtype == torch.bool:
                raise ValueError("columns_to_keep must be numbers of columns, (batch or 1, columns).")
            if self._returns(kwargs, "output_hidden_states"):
                raise ValueError("output_hidden_states=True returns those of all columns: leave columns_to_keep out.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **taken_packing(kwargs),
        }
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        kept_from, starts, lengths = 0, [0], [length]
        if (
            piece_length := self._piece_length(shape, states.device, past_key_values, chunk_length, kwargs)
        ) is not None:
            # The last layer need not compute what nobody asks for.
            if columns_to_keep is not None:
                kept_from, last = map(int, columns_to_keep.aminmax())
                if not 0 <= kept_from <= last < length:
                    raise ValueError(f"columns_to_keep has columns from {kept_from} to {last}, the inputs {length}.")
            if states.device.type != "cpu":
                # There, a call of a few tokens takes longer than the last layer of a piece.
                kept_from -= kept_from % piece_length
            starts = [*range(0, kept_from, piece_length), *range(kept_from, length, piece_length)]
            lengths = [end - start for start, end in zip(starts, [*starts[1:], length])]
            if input_ids is not None:
                # An id that is none in a later piece would leave the cache with what the earlier ones have read.
                try:
                    self.embed_tokens(torch.stack(input_ids.aminmax()))
                except IndexError as error:
                    raise IndexError(self._foreign_ids(input_ids)) from error
        past = past_key_values
        if past is None:
            past = Past() if len(starts) == 1 else self.new_cache()

        parts: list[torch.Tensor] = []
        for start, piece in zip(starts, split_call(inputs, lengths, past.tokens_read)):
            # Not in a function of its own, which would be one graph more where what follows breaks one.
            try:
                inputs_embeds = (
                    self.embed_tokens(piece["input_ids"]) if "input_ids" in piece else piece["inputs_embeds"]
                )
            except IndexError as error:
                raise IndexError(self._foreign_ids(piece["input_ids"])) from error
            if start == 0 and isinstance(past, InfiniCache):
                self._check_cache(past, inputs_embeds)
            mask, position_ids, shape = piece.get("attention_mask"), piece.get("position_ids"), inputs_embeds.shape[:2]
            is_step = isinstance(past, InfiniCache) and shape[1] == 1
            looks_at_values = not is_step and any(v is not None for v in (mask, position_ids, past.tokens_read))
            # What looks at values breaks a graph, here once; deeper inside, once for each function around it.
            plan = _plan_outside_of_graphs if looks_at_values and not torch.compiler.is_exporting() else _plan_call
            layout = plan(past, mask, position_ids, shape, self.config, inputs_embeds.device, taken_packing(piece))
            hidden_states = self._read(inputs_embeds, layout, past, start < kept_from, kwargs)
            if columns_to_keep is None:
                parts.append(hidden_states)
            elif len(starts) == 1:
                parts = [take(hidden_states, columns_to_keep.to(hidden_states.device))]
            elif start >= kept_from:
                columns = columns_to_keep.to(hidden_states.device) - start
                is_here = ((columns >= 0) & (columns < hidden_states.shape[1])).unsqueeze(-1)
                found = take(hidden_states, columns.clamp(0, hidden_states.shape[1] - 1))
                parts = [torch.where(is_here, found, parts[0] if parts else 0)]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(torch.cat(parts, 1) if len(parts) > 1 else parts[0]),
            **{CACHE_NAME: past_key_values if isinstance(past_key_values, InfiniCache) else None},  # type: ignore[arg-type]
        )

    def _foreign_ids(self, input_ids: torch.Tensor) -> str:
        return (
            f"input_ids has ids from {int(input_ids.min())} to {int(input_ids.max())}, and the model a vocabulary of "
            f"{self.config.vocab_size} tokens: the tokenizer is another model's."
        )

    def _returns(self, kwargs: dict, name: str) -> bool:
        """Whether a call asks for what transformers collects from each layer."""
        return bool(kwargs.get(name, getattr(self.config, name)))

    def _piece_length(
        self,
        shape: torch.Size,
        device: torch.device,
        past: Past | None,
        chunk_length: int | None,
        kwargs: dict,
    ) -> int | None:
        """How many columns of a call are read at a time; `None` if they are few, or something asks for all at once."""
        # A graph is of one call: pieces would break it, each by a look at what was read before.
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        (batch_size, length), segment_length = shape, self.config.segment_length
        columns = PIECE_TOKENS if device.type == "cpu" else GPU_PIECE_TOKENS // batch_size
        piece_length = chunk_length or segment_length * max(1, columns // segment_length)
        if length <= piece_length or not (past is None or isinstance(past, InfiniCache)):
            return None
        if any(self._returns(kwargs, name) for name in ("output_hidden_states", "output_attentions")):
            return None
        # Unless asked to: dropout and noise are drawn for a call, and a second run with gradients must draw them so;
        # and weights that are sharded are gathered in each call, of which all processes must make equally many.
        is_whole = chunk_length is None and (
            is_deepspeed_zero3_enabled()
            or any(module.training or is_fsdp_managed_module(module) for module in self.modules())
        )
        return None if is_whole else piece_length

    def _read(
        self, inputs_embeds: torch.Tensor, layout: Layout, past: Past, writes_only: bool, kwargs: dict
    ) -> torch.Tensor:
        """The output of the last layer `(B, T, hidden_size)` for a piece of a call; its input with `writes_only`."""
        call = {
            "attention_mask": local_attention_mask(self.config, layout, inputs_embeds),
            "position_embeddings": self._angles(inputs_embeds, layout, past),
            "layout": layout,
            **kwargs,
        }
        if self._returns(kwargs, "output_attentions"):
            if self.config.num_memory_slots:
                raise ValueError(
                    "output_attentions=True cannot say in which columns the tokens of the slots stand "
                    f"(num_memory_slots={self.config.num_memory_slots}): each layer has others."
                )
            call["window_columns"] = past.window_columns(layout, inputs_embeds.shape[:2])
        has_sliding_window = self.config.is_sliding and not isinstance(layout, DecodeLayout)
        if has_sliding_window and is_flash_attention_requested(self.config):
            call["sliding_window"] = self.config.segment_length

        hidden_states = inputs_embeds
        # Who wraps layers for checkpointing does not tell the model.
        layers = past.begin_call(layout, torch.is_grad_enabled())
        for index, (decoder_layer, layer_past) in enumerate(zip(self.layers, layers)):
            call["writes_only"] = writes_only and index == len(layers) - 1
            hidden_states = decoder_layer(hidden_states, past=layer_past, **call)
        past.finish_call(layout, inputs_embeds.shape[1], layers)
        return hidden_states

    def _check_cache(self, cache: InfiniCache, inputs_embeds: torch.Tensor) -> None:
        # A configuration may have been changed since the cache was made; a graph is not made anew for that.
        if cache.config is not self.config or not torch.compiler.is_compiling():
            self.config.require_same_memory(cache.memory_fields, "The cache")
        # A step of a graph does not look at the weights, nor does an export. A call of several tokens breaks its graph
        # as it is, where something was read before.
        has_read_more = cache.tokens_read is not None and inputs_embeds.shape[1] > 1
        if not torch.compiler.is_compiling() or (has_read_more and not torch.compiler.is_exporting()):
            self._check_weights(cache, inputs_embeds)
        # Before anything is read. A layer that others wrap finds out when it runs.
        is_checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        checkpointing = self.layers[0]._gradient_checkpointing_func if is_checkpointed else None
        if getattr(checkpointing, "keywords", {}).get("use_reentrant"):
            raise ValueError(LOSES_GRADIENTS)

    @torch.compiler.disable
    def _check_weights(self, cache: InfiniCache, inputs_embeds: torch.Tensor) -> None:
        # Training changes the weights while a memory goes on, and there is no time to look at them.
        unseen = WeightsId(None, name_of(self))
        if self.training and (cache.allow_other_weights or cache.weights in (None, unseen)):
            cache.weights = unseen
            return
        is_step = inputs_embeds.shape[1] == 1
        current = WeightsId.of(self, is_step and cache.was_step)
        cache.was_step = is_step
        cache.require_weights(current, self.training, inputs_embeds.dtype)

    def _angles(self, inputs_embeds: torch.Tensor, layout: Layout, past: Past) -> RotaryAngles:
        table = past.angle_table
        if table is None or table[0].dtype != inputs_embeds.dtype:
            table = angle_table(self.rotary_emb, self.config, inputs_embeds)
            if isinstance(past, InfiniCache):
                past.angle_table = table
        return angles_of_call(table, layout)


@auto_docstring
class InfiniForCausalLM(InfiniPreTrainedModel, InfiniGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.model = InfiniModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

        self.post_init()

    @can_return_tuple
    @auto_docstring(custom_args=ARGUMENTS)
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: InfiniCache | None = None,
        tokens_last: bool = False,
        chunk_length: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_infini import InfiniForCausalLM

        >>> model = InfiniForCausalLM.from_pretrained("path/to/converted-model")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/converted-model")
        >>> inputs = tokenizer(open("book.txt").read(), return_tensors="pt")
        >>> generated_ids = model.generate(**inputs, max_new_tokens=30)
        ```"""
        if input_ids is not None:
            require_ids(input_ids)
        past_key_values = one_past(past_key_values, cache)
        if use_cache and past_key_values is None and not torch.is_grad_enabled():
            # Made here: in the base model, transformers turns use_cache off in training with gradient checkpointing,
            # and without gradients nothing is checkpointed.
            past_key_values = self.new_cache()
        has_targets = labels is not None or kwargs.get("shift_labels") is not None
        if past_key_values is not None:
            past_key_values.check_targets(labels, has_targets, kwargs.get("num_items_in_batch"))
        if tokens_last and (has_targets or not isinstance(logits_to_keep, int)):
            raise ValueError("tokens_last=True changes the order of the logits, and not that of labels or indices.")
        states = input_ids if inputs_embeds is None else inputs_embeds
        kept: int | torch.Tensor = logits_to_keep
        if states is not None and isinstance(logits_to_keep, int) and (logits_to_keep or tokens_last):
            if tokens_last and attention_mask is not None:
                columns = columns_tokens_last(attention_mask, states.shape[1])
            else:
                columns = torch.arange(states.shape[1], device=states.device).unsqueeze(0)
            kept = columns[:, -logits_to_keep:]
        # The base model then computes no other last hidden states, unless they are to be returned.
        is_by_base = kept is not logits_to_keep and not self.model._returns(kwargs, "output_hidden_states")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            columns_to_keep=kept if is_by_base else None,
            chunk_length=chunk_length,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states if is_by_base else _kept_columns(hidden_states, kept))
        loss = None
        if has_targets:
            if position_ids is not None and past_key_values is None and not torch.compiler.is_compiling():
                warn_of_lost_start(position_ids, attention_mask, states.shape[1], None)
            if attention_mask is not None and kwargs.get("shift_labels") is None:
                kwargs["shift_labels"] = targets(labels, attention_mask)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class BaseModelByAutoModel:
    """
    transformers' heads make their base model by `AutoModel.from_config`, which finds it by the class of the
    configuration. Remote code in a local folder is imported once for the configuration and once more for the model,
    so that this class is not the `InfiniConfig` of this module.
    """

    def __init__(self, config: InfiniConfig):
        AutoModel.register(type(config), InfiniModel, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]

    def __call__(self, *args, **kwargs):
        for argument in (*args, *kwargs.values()):
            if hasattr(argument, "plan_call") and not isinstance(argument, InfiniCache):
                raise ValueError(
                    f"{type(argument).__name__} is for InfiniForCausalLM and InfiniModel: the loss of other heads "
                    "does not add up over the parts of a sequence."
                )
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class InfiniForSequenceClassification(BaseModelByAutoModel, GenericForSequenceClassification, InfiniPreTrainedModel):
    # The signature says which columns of a data set the Trainer keeps.
    @functools.wraps(GenericForSequenceClassification.forward)
    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):  # type: ignore[override]
        if attention_mask is not None:
            pad_token_id = self.config.pad_token_id
            if input_ids is not None and pad_token_id is not None:
                # transformers takes the last id that is not pad_token_id for a row's last token.
                input_ids = input_ids.masked_fill(~last_tokens(attention_mask, input_ids.shape[1]), pad_token_id)
            elif not last_tokens(attention_mask, 1).all():
                raise ValueError(
                    "The last column is classified, and it is padding in some row: pad inputs_embeds on the left; "
                    "for input_ids, set config.pad_token_id."
                )
        return super().forward(input_ids, attention_mask, *args, **kwargs)


class InfiniForTokenClassification(BaseModelByAutoModel, GenericForTokenClassification, InfiniPreTrainedModel):
    @can_return_tuple
    @functools.wraps(GenericForTokenClassification.forward)
    def forward(  # type: ignore[override]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ):
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = super().forward(*inputs, **kwargs, return_dict=True)
        logits, loss = outputs.logits, None
        if labels is not None:
            labels = labels.to(logits.device)
            if attention_mask is not None:
                # Padding is of no class.
                labels = labels.masked_fill(~last_tokens(attention_mask, labels.shape[1]).to(labels.device), -100)
            loss = self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class InfiniForQuestionAnswering(BaseModelByAutoModel, GenericForQuestionAnswering, InfiniPreTrainedModel):
    @can_return_tuple
    @functools.wraps(GenericForQuestionAnswering.forward)
    def forward(  # type: ignore[override]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ):
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = super().forward(*inputs, **kwargs, return_dict=True)
        logits = (outputs.start_logits, outputs.end_logits)
        if attention_mask is not None:
            # An answer neither starts nor ends in padding, which the softmax over all columns would leave room for.
            is_token = last_tokens(attention_mask, logits[0].shape[1])
            logits = tuple(states.masked_fill(~is_token, torch.finfo(states.dtype).min) for states in logits)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(*logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(loss, *logits, outputs.hidden_states, outputs.attentions)


# By these names the stock Trainer knows which models' labels it must shift when it smooths them itself.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(InfiniConfig.model_type, InfiniForCausalLM.__name__)

__all__ = [
    "InfiniForCausalLM",
    "InfiniForQuestionAnswering",
    "InfiniForSequenceClassification",
    "InfiniForTokenClassification",
    "InfiniModel",
    "InfiniPreTrainedModel",
]
