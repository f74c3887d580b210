"""
Infini-attention for transformers: a Llama whose attention is local, plus a compressive memory of constant size.

    input_ids -> streams -> per layer: q, k, v -> local attention ┐
                                              └> memory read     ┴> gate -> output
"""

import functools
import math
import os
from collections.abc import Callable

import torch
from einops import rearrange
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel
from transformers import initialization as init
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
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE_NAME, InfiniCache, StreamCounters, one_cache
from .cache_layer import (
    CheckpointedLayer,
    InfiniCacheLayer,
    KeyStates,
    MemoryState,
    local_window,
    memory_dtype,
    scan_memory,
)
from .configuration_infini import InfiniConfig
from .context_parallel import ContextParallel, memory_of_piece, window_of_piece
from .fingerprint import WeightsId, name_of
from .generation_infini import InfiniGenerationMixin
from .masks import (
    columns_tokens_last,
    last_tokens,
    local_attention_mask,
    plan_call,
    split_call,
    streams_of_call,
    taken_packing,
    targets,
    warn_of_lost_start,
)
from .memory import feature_map, read_memory
from .rotary import RotaryAngles, angle_positions, angle_table, relative_angles, rotate
from .streams import DecodeLayout, SegmentLayout, take
from .tensor_parallel import check_heads


# A prompt is read in calls of about this many tokens where only its last logits are asked for.
PREFILL_TOKENS = 2048


class InfiniHeadGates(nn.Module):
    """
    One gate per query head: the share of local attention, `sigmoid(head_gate_scale * weight)`, in the mix with the
    memory. In the paper (arXiv 2404.07143, eq. 10) the sigmoid is the share of the memory instead.
    """

    def __init__(self, config: InfiniConfig):
        super().__init__()
        self.scale = config.head_gate_scale
        self.weight = nn.Parameter(
            torch.full(
                (config.num_attention_heads,),
                config.head_gate_init_value / config.head_gate_scale,
                # Where weights stay on disk, transformers reads them in the dtype that they are made in.
                dtype=memory_dtype(torch.get_default_dtype()),
            )
        )

    def forward(self) -> torch.Tensor:
        """The share of local attention, `(num_attention_heads,)`, at least in float32."""
        return self.share(self.weight)

    def share(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.scale * weight.to(memory_dtype(weight.dtype)))


class InfiniMemoryNorm(nn.Module):
    """
    RMS-norm of each head's queries or keys on their way to the memory, times a learned scale: exp(weight) x / rms(x).

    As for CLIP's temperature (arXiv 2103.00020), the logarithm is what is learned: one step of Adam changes a scale by
    the same ratio wherever it stands.
    """

    def __init__(self, config: InfiniConfig, num_heads: int):
        super().__init__()
        self.eps = config.rms_norm_eps
        scale = math.log(config.memory_norm_init_scale or 1)
        self.weight = nn.Parameter(torch.full((num_heads,), scale, dtype=memory_dtype(torch.get_default_dtype())))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., heads, head_dim)` -> the same, at least in float32."""
        states = states.to(memory_dtype(states.dtype))
        normed = nn.functional.rms_norm(states, states.shape[-1:], eps=self.eps)
        return normed * self.weight.to(states.dtype).exp().unsqueeze(-1)


class InfiniWriteGate(nn.Linear):
    """
    How much of each token is remembered: the logits W x + b of the gates g, one per KV head. No more than a linear
    layer, so that what adapts, quantizes or shards such layers is right here.

    log g, by [`log_write_gates`], is added to a key where sigma is exponential, and so multiplies what the
    token adds to M and z: the input gate of an LSTM, for a memory whose reads are relative to all that was written.
    """

    INITIAL_LOGIT = 3.0

    def __init__(self, config: InfiniConfig):
        super().__init__(config.hidden_size, config.num_key_value_heads)


def log_write_gates(logits: torch.Tensor) -> torch.Tensor:
    """log sigmoid of the logits of write gates `(..., kv_heads)`, at least in float32."""
    if isinstance(logits, DTensor):
        # Each process has the logits of its own heads. DTensors have no backward of logsigmoid.
        logits = logits.to_local()
    return nn.functional.logsigmoid(logits.to(memory_dtype(logits.dtype)))


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

        qkv_bias = config.attention_bias if config.qkv_bias is None else config.qkv_bias
        output_bias = config.attention_output_bias
        output_bias = config.attention_bias if output_bias is None else output_bias
        query_dim, key_value_dim = (
            heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=output_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.head_gates = InfiniHeadGates(config)
        if config.learned_delta_update:
            self.write_strength = nn.Linear(config.hidden_size, config.num_key_value_heads, bias=False)
        if config.memory_norm_init_scale is not None:
            self.memory_query_norm = InfiniMemoryNorm(config, config.num_attention_heads)
            self.memory_key_norm = InfiniMemoryNorm(config, config.num_key_value_heads)
        if config.memory_write_gate:
            self.memory_write_gate = InfiniWriteGate(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: RotaryAngles,
        attention_mask: torch.Tensor | None,
        layout: SegmentLayout | DecodeLayout,
        past_key_values: InfiniCache | None = None,
        window_columns: tuple[torch.Tensor, int] | None = None,
        context_parallel: ContextParallel | None = None,
        writes_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states: `(B, T, hidden_size)`.
            position_embeddings: of the call's tokens, relative to their segments.
            attention_mask: what the queries of each segment see of its window, in the attention backend's format.
            layout: where the call's tokens stand in their streams.
            window_columns: the column `(G, window)` in each window's slots and the number of columns in all, where
                attention weights are to be returned.
            context_parallel: the ranks that the sequence is split over, of which this one has `layout`'s columns.
            writes_only: whether this layer writes to the cache, and nobody asks for what it computes.

        Returns:
            `(B, T, hidden_size)`, `None` with `writes_only`; and the weights of local attention
            `(B, heads, T, columns)` if asked for.
        """
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        keys = self.k_proj(hidden_states).view(hidden_shape)
        values = self.v_proj(hidden_states).view(hidden_shape)
        if self.config.qk_norm:
            keys = self.k_norm(keys)

        strength = None
        if self.config.learned_delta_update:
            strength = self.write_strength(hidden_states).to(memory_dtype(hidden_states.dtype)).sigmoid()
        memory_keys = None
        if self.config.memory_norm_init_scale is not None:
            memory_keys = self.memory_key_norm(keys)
        if self.config.memory_write_gate:
            memory_keys = keys if memory_keys is None else memory_keys
            memory_keys = memory_keys + log_write_gates(self.memory_write_gate(hidden_states)).unsqueeze(-1)

        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        key_states = KeyStates.rotated(keys, position_embeddings, layout, memory_keys)
        if isinstance(layout, DecodeLayout):
            window = layer.decode_window(key_states, values, layout, strength)
            memory = MemoryState(layer.memory, layer.normaliser)
            # A write makes new states, so that those that the token reads stay as they are.
            layer.decode_memory(key_states.of_memory, values, layout, strength)
        else:
            window, memory = self._window_and_memory(key_states, values, layout, layer, strength, context_parallel)
        if writes_only:
            return None, None

        queries = self.q_proj(hidden_states).view(hidden_shape)
        if self.config.qk_norm:
            queries = self.q_norm(queries)
        has_norm = self.config.memory_norm_init_scale is not None
        memory_queries = self.memory_query_norm(queries) if has_norm else queries
        rotated_queries = rotate(queries, position_embeddings.own)
        if not isinstance(layout, DecodeLayout):
            memory_queries, rotated_queries = map(layout.to_segments, (memory_queries, rotated_queries))

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            rotated_queries.transpose(1, 2),
            window.keys.transpose(1, 2),
            window.values.transpose(1, 2),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if memory is not None:
            output = self._mix(output, self._read(memory_queries, memory), layout)
        # What is written may be read in a later call alone.
        if torch.is_grad_enabled() and (memory is None or strength is not None or memory_keys is not None):
            # Without a norm, the memory's queries are those of local attention.
            normed_queries = None if self.config.memory_norm_init_scale is None else memory_queries
            output = output + self._zero(strength, normed_queries, memory_keys)
        if not isinstance(layout, DecodeLayout):
            output = layout.to_columns(output)

        # Contiguous, since tensor parallelism takes it for that: the columns may be a slice of the segments' slots.
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        weights = None if window_columns is None or weights is None else _by_column(weights, *window_columns, layout)
        return output, weights

    def _window_and_memory(
        self,
        keys: KeyStates,
        values: torch.Tensor,
        layout: SegmentLayout,
        layer: InfiniCacheLayer | None,
        strength: torch.Tensor | None,
        context_parallel: ContextParallel | None,
    ):
        if context_parallel is not None:
            window = window_of_piece(keys, values, layout, context_parallel)
            return window, memory_of_piece(keys.of_memory, values, layout, context_parallel, self.config, strength)
        if layer is not None:
            window, memory = layer.update(keys, values, layout, strength)
            return window, memory if layout.reads_past else None
        window = local_window(keys, values, layout, None)
        if not layout.reads_past:
            return window, None
        return window, scan_memory(keys.of_memory, values, layout, None, self.config, strength).before

    def _zero(self, *of_memory: torch.Tensor | None) -> torch.Tensor:
        """
        0, and a gradient of 0 for what a text within one segment does not use: processes that train on texts of
        different lengths exchange gradients of the same parameters.
        """
        unused = [self.head_gates(), *(states for states in of_memory if states is not None)]
        return 0 * sum(states.sum() for states in unused)

    def _read(self, queries: torch.Tensor, memory: MemoryState) -> torch.Tensor:
        """Reads each segment's memory for `queries` `(G, length, heads, head_dim)`, whose groups share a KV head's."""
        heads = memory.memory.shape[1]
        grouped = rearrange(queries, "g l (h r) d -> g h (r l) d", h=heads).to(memory.memory.dtype)
        features = feature_map(grouped.contiguous())
        read = read_memory(features, *memory, self.config.memory_eps)
        return rearrange(read, "g h (r l) d -> g l (h r) d", l=queries.shape[1])

    def _mix(self, local: torch.Tensor, read: torch.Tensor, layout: SegmentLayout | DecodeLayout) -> torch.Tensor:
        """g * local + (1 - g) * read, and local alone in a stream's first segment; `(G, length, heads, head_dim)`."""
        has_memory = (layout.segment_index > 0).unsqueeze(1)
        memory_share = has_memory * (1 - self.head_gates().to(read.dtype))
        # From `local`, whose layout the result takes: it is the one that the output projection wants.
        return torch.lerp(local.to(read.dtype), read, memory_share[:, None, :, None]).to(local.dtype)


def _by_column(
    weights: torch.Tensor, columns: torch.Tensor, num_columns: int, layout: SegmentLayout | DecodeLayout
) -> torch.Tensor:
    """Attention weights over windows, `(G, heads, length, window)`, as `(B, heads, T, num_columns)`."""
    by_column = weights.new_zeros(*weights.shape[:-1], num_columns)
    by_column = by_column.scatter_add(-1, columns[:, None, None].expand_as(weights), weights)
    if isinstance(layout, DecodeLayout):
        return by_column
    return layout.to_columns(by_column.transpose(1, 2)).transpose(1, 2)


class InfiniDecoderLayer(LlamaDecoderLayer):
    # With a [`CheckpointedLayer`] for its cache, a layer that runs again starts from the same state.
    _can_checkpoint_with_cache = True

    def __init__(self, config: InfiniConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = InfiniAttention(config, layer_idx)  # type: ignore[assignment]

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """
        `(B, T, hidden_size)` -> the same; unchanged where the layer only writes to the cache. Not Llama's, whose name
        for a cache depends on the version.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if attended is None:
            return hidden_states
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@auto_docstring
class InfiniPreTrainedModel(PreTrainedModel):
    config: InfiniConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InfiniDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # What every configuration has; an instance adds what its own has.
    _keep_in_fp32_modules_strict = ["head_gates"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_context_parallel = False
    _can_compile_fullgraph = False
    _can_record_outputs = {"hidden_states": InfiniDecoderLayer, "attentions": InfiniAttention}

    def __init__(self, config: InfiniConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.memory_norm_init_scale is not None:
            norms = ("memory_query_norm", "memory_key_norm")
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, *norms]

    @classmethod
    def is_backend_compatible(cls) -> bool:
        # Asked by vLLM before it puts its own attention over paged keys into a model: that would hold no memory.
        return False

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if distributed_config is not None:
            check_heads(model.config, distributed_config.tp_size)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def local_shares(self) -> torch.Tensor:
        """
        What the gates give to local attention, `(num_hidden_layers, num_attention_heads)`, at least in float32. Where
        the gates are sharded over processes, each of them must call it.
        """
        # By layer, since PEFT keeps the gates that it trains beside the original ones.
        gates = [module.head_gates for module in self.modules() if isinstance(module, InfiniAttention)]
        # Of sharded gates, each process has the heads that it runs, or none.
        shares = [
            gate.share(gate.weight.full_tensor()) if isinstance(gate.weight, DTensor) else gate() for gate in gates
        ]
        return torch.stack([share.cpu() for share in shares])

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
            from conversion.model_card import write_missing_card
        except ImportError:
            # Published code runs without this package. The card is then the one that transformers makes up.
            pass
        else:
            write_missing_card(self, working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, InfiniHeadGates):
            init.constant_(module.weight, self.config.head_gate_init_value / self.config.head_gate_scale)
        if isinstance(module, InfiniMemoryNorm):
            init.constant_(module.weight, math.log(self.config.memory_norm_init_scale))
        if isinstance(module, InfiniWriteGate):
            init.constant_(module.bias, InfiniWriteGate.INITIAL_LOGIT)


@auto_docstring
class InfiniModel(InfiniPreTrainedModel):
    def __init__(self, config: InfiniConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [InfiniDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False

        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        context_parallel: ContextParallel | None = None,
        cache: InfiniCache | None = None,
        writes_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        attention_mask (`torch.Tensor` of shape `(batch, columns)`, *optional*):
            0 for padding, wherever it stands, and 1 for tokens, or the numbers 1, 2, ... of packed documents, each of
            which is a stream; of a longer history, only the last columns belong to this call.
        position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Serve only to find where packed documents start: a new stream starts at each token whose id is 0. Others
            must grow from token to token.
        past_key_values ([`InfiniCache`], *optional*):
            What was read so far; this call is read into it.
        context_parallel ([`~modeling_infini.context_parallel.ContextParallel`], *optional*):
            The ranks that the sequence is split over; the inputs are this rank's columns.
        cache ([`InfiniCache`], *optional*):
            `past_key_values`, by the name that transformers has for it from 5.24 on.
        writes_only (`bool`, *optional*, defaults to `False`):
            Whether nothing is asked for but that `past_key_values` reads the call. The last layer then writes its
            keys, values and memory and computes nothing else; `last_hidden_state` is `None`.
        """
        past_key_values = one_cache(past_key_values, cache)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if context_parallel is not None:
            context_parallel.check_call(past_key_values is not None or use_cache, wants_attentions)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        self._check_cache(past_key_values, inputs_embeds)
        if writes_only and past_key_values is None:
            raise ValueError("writes_only=True needs past_key_values or use_cache=True: there is nothing to write to.")
        if writes_only and kwargs.get("output_hidden_states", self.config.output_hidden_states):
            raise ValueError("writes_only=True computes no last hidden states: leave output_hidden_states out.")

        batch_size, length = inputs_embeds.shape[:2]
        if length == 0:
            raise ValueError("The inputs have no columns: there is nothing to read.")
        if kwargs.get("is_causal") is False:
            raise ValueError("is_causal=False is not supported: a memory holds what was read before.")
        packing = taken_packing(kwargs)
        shape, device = (batch_size, length), inputs_embeds.device
        tokens_read = None if past_key_values is None else past_key_values.tokens_read
        counters = None if past_key_values is None else past_key_values.start_call(batch_size, device)
        layout: DecodeLayout | SegmentLayout
        if context_parallel is not None:
            tokens_read = context_parallel.has_read(batch_size, device)
            tokens, restarts = streams_of_call(attention_mask, position_ids, *shape, tokens_read, packing)
            layout = context_parallel.plan(shape, tokens, restarts, self.config, device)
        elif counters is not None and length == 1:
            tokens, restarts = streams_of_call(attention_mask, position_ids, *shape, tokens_read, packing)
            layout = DecodeLayout(
                counters.tokens_read,
                None if tokens is None else tokens.squeeze(1),
                None if restarts is None else restarts.squeeze(1),
                self.config.segment_length,
            )
        else:
            tokens, restarts, layout = plan_call(
                attention_mask, position_ids, shape, tokens_read, self.config, device, packing
            )

        hidden_states = inputs_embeds
        position_embeddings = self._rotary_angles(inputs_embeds, layout, past_key_values)
        window_mask = local_attention_mask(self.config, layout, inputs_embeds)
        if wants_attentions:
            kwargs["window_columns"] = _window_columns(self.config, layout, counters, (batch_size, length))
        if is_flash_attention_requested(self.config) and isinstance(layout, SegmentLayout) and self.config.is_sliding:
            kwargs["sliding_window"] = self.config.segment_length
        if past_key_values is not None:
            past_key_values.begin_reading()
        is_checkpointed = (
            past_key_values is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        )
        for index, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            checkpointed = CheckpointedLayer(past_key_values.layers[index]) if is_checkpointed else None
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=window_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values if checkpointed is None else checkpointed,
                layout=layout,
                context_parallel=context_parallel,
                writes_only=writes_only and index == self.config.num_hidden_layers - 1,
                **kwargs,
            )
            if checkpointed is not None:
                past_key_values.layers[index] = checkpointed.after
        if past_key_values is not None:
            past_key_values.finish_call(layout, length, tokens, restarts)

        return BaseModelOutputWithPast(
            last_hidden_state=None if writes_only else self.norm(hidden_states),
            **{CACHE_NAME: past_key_values},  # type: ignore[arg-type]
        )

    def _check_cache(self, cache: InfiniCache | None, inputs_embeds: torch.Tensor) -> None:
        if cache is None:
            return
        # A configuration may have been changed since the cache was made; a graph is not made anew for that.
        if cache.config is not self.config or not torch.compiler.is_compiling():
            self.config.require_same_memory(cache.memory_fields, "The cache")
        # A step of a graph does not look at the weights, nor does an export. A call of several tokens breaks its graph
        # as it is, where something was read before.
        has_read_more = cache.tokens_read is not None and inputs_embeds.shape[1] > 1
        if not torch.compiler.is_compiling() or (has_read_more and not torch.compiler.is_exporting()):
            self._check_weights(cache, inputs_embeds)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            checkpoint_arguments = getattr(self.layers[0]._gradient_checkpointing_func, "keywords", {})
            if checkpoint_arguments.get("use_reentrant"):
                raise ValueError(
                    "Reentrant gradient checkpointing loses the gradient of what is read into past_key_values. Call "
                    'gradient_checkpointing_enable({"use_reentrant": False}), or train without past_key_values.'
                )

    @torch.compiler.disable
    def _check_weights(self, cache: InfiniCache, inputs_embeds: torch.Tensor) -> None:
        name = name_of(self)
        # Training changes the weights while a memory goes on, and there is no time to look at them.
        is_unknown = cache.weights is None or (cache.weights.model == name and cache.weights.fingerprint is None)
        if self.training and (is_unknown or cache.allow_other_weights):
            cache.weights = WeightsId(None, name)
            return
        is_step = inputs_embeds.shape[1] == 1
        current = WeightsId.of(self, is_step and cache.was_step)
        cache.was_step = is_step
        cache.require_weights(current, self.training, inputs_embeds.dtype)

    def _rotary_angles(
        self, inputs_embeds: torch.Tensor, layout: SegmentLayout | DecodeLayout, cache: InfiniCache | None
    ) -> RotaryAngles:
        table = None if cache is None else cache.angle_table
        if table is None or table[0].dtype != inputs_embeds.dtype:
            positions = angle_positions(self.config, inputs_embeds.device)
            table = angle_table(*self.rotary_emb(inputs_embeds, positions))
            if cache is not None:
                cache.angle_table = table
        if isinstance(layout, DecodeLayout):
            return relative_angles(table, layout.offset.unsqueeze(1), self.config, layout.position)
        angles = relative_angles(table, layout.offsets, self.config)
        return angles if cache is not None or layout.reads_past else RotaryAngles(angles.own)


def _window_columns(
    config: InfiniConfig, layout: SegmentLayout | DecodeLayout, counters: StreamCounters | None, shape: tuple[int, int]
) -> tuple[torch.Tensor, int]:
    """The column in each slot of the windows, `(G, window)`, arbitrary where nothing is seen; number of columns."""
    batch_size, length = shape
    if isinstance(layout, DecodeLayout):
        slots = (config.num_sink_tokens + layout.offset).unsqueeze(1)
        columns = counters.slot_columns.scatter(1, slots, counters.columns.expand(batch_size, 1))
        return columns, int(counters.columns) + 1
    if counters is None:
        counters = StreamCounters(batch_size, config, layout.offsets.device)
    columns, ring = counters.call_columns(length), counters.ring_columns()
    parts = [layout.own(columns, ring)]
    if config.is_sliding and layout.reads_past:
        parts.insert(0, layout.previous(columns, ring))
        parts.insert(0, layout.of_segment(counters.sink_columns(layout, columns)))
    return torch.cat(parts, 1), int(counters.columns) + length


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
    @auto_docstring
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
        context_parallel: ContextParallel | None = None,
        cache: InfiniCache | None = None,
        tokens_last: bool = False,
        chunk_length: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        attention_mask (`torch.Tensor` of shape `(batch, columns)`, *optional*):
            0 for padding, wherever it stands, and 1 for tokens, or the numbers 1, 2, ... of packed documents, each of
            which is a stream; of a longer history, only the last columns belong to this call.
        position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Serve only to find where packed documents start: a new stream starts at each token whose id is 0. Others
            must grow from token to token.
        past_key_values ([`InfiniCache`], *optional*):
            What was read so far; this call is read into it.
        context_parallel ([`~modeling_infini.context_parallel.ContextParallel`], *optional*):
            The ranks that the sequence is split over; the inputs are this rank's columns.
        cache ([`InfiniCache`], *optional*):
            `past_key_values`, by the name that transformers has for it from 5.24 on.
        tokens_last (`bool`, *optional*, defaults to `False`):
            Whether the logits come with each row's padding first and its tokens last, wherever padding stands in the
            inputs: the last column is then that of the last token that the row has read. An int `logits_to_keep`
            counts these columns. Nothing else changes its order. `generate()` asks for it.
        chunk_length (`int`, *optional*):
            The number of columns that are read at a time where only the last logits and a cache are asked for, and no
            gradient; about 2,048 if left out.

        Example:

        ```python
        >>> from transformers import AutoTokenizer
        >>> from modeling_infini import InfiniForCausalLM

        >>> model = InfiniForCausalLM.from_pretrained("path/to/converted-model")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/converted-model")
        >>> inputs = tokenizer(open("book.txt").read(), return_tensors="pt")
        >>> generated_ids = model.generate(**inputs, max_new_tokens=30)
        ```"""
        past_key_values = one_cache(past_key_values, cache)
        if use_cache and past_key_values is None and not torch.is_grad_enabled():
            # Else transformers would leave it out in training with gradient checkpointing, which does nothing here.
            past_key_values = self.new_cache()
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **taken_packing(kwargs),
        }
        has_targets = labels is not None or kwargs.get("shift_labels") is not None
        if context_parallel is not None:
            context_parallel.check_targets(labels, has_targets, kwargs.get("num_items_in_batch"))
        if tokens_last and (has_targets or not isinstance(logits_to_keep, int)):
            raise ValueError("tokens_last=True changes the order of the logits, and not that of labels or indices.")
        kept: int | torch.Tensor = logits_to_keep
        if tokens_last and attention_mask is not None and isinstance(logits_to_keep, int):
            states = input_ids if inputs_embeds is None else inputs_embeds
            kept = columns_tokens_last(attention_mask, states.shape[1])[:, -logits_to_keep:]
        reads_all = has_targets or context_parallel is not None
        if chunk_length is not None and chunk_length < 1:
            raise ValueError(
                f"chunk_length, prefill_chunk_size in generate(), must be at least 1, got {chunk_length}."
            )
        keeps_last = isinstance(logits_to_keep, int) and logits_to_keep > 0 and not reads_all
        if keeps_last and self._can_read_in_chunks(inputs, past_key_values, use_cache, chunk_length, kwargs):
            outputs = self._read_in_chunks(inputs, past_key_values, kept, chunk_length, kwargs)
            hidden_states = outputs.last_hidden_state
        else:
            outputs = self.model(
                **inputs,
                past_key_values=past_key_values,
                use_cache=use_cache,
                context_parallel=context_parallel,
                **kwargs,
            )
            hidden_states = slice_logits_to_keep(outputs.last_hidden_state, kept)
        logits = self.lm_head(hidden_states)
        loss = None
        if has_targets:
            starts_empty = past_key_values is None and context_parallel is None
            if position_ids is not None and starts_empty and not torch.compiler.is_compiling():
                warn_of_lost_start(position_ids, attention_mask, outputs.last_hidden_state.shape[1], None)
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

    def _can_read_in_chunks(
        self, inputs: dict, cache: InfiniCache | None, use_cache: bool | None, chunk_length: int | None, kwargs: dict
    ) -> bool:
        """Whether a call is long, and nothing but a cache is asked for of its first columns."""
        states = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        longest = self._chunk_length if chunk_length is None else chunk_length
        if states is None or states.shape[1] <= longest or torch.is_grad_enabled():
            return False
        records = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name, getattr(self.config, name)) for name in records):
            return False
        if not (cache is not None or (self.config.use_cache if use_cache is None else use_cache)):
            return False
        # Unless asked to: dropout and noise are drawn for a call, and a second run with gradients must draw them so;
        # and weights that are sharded are gathered in each call, of which all processes must make equally many.
        is_sharded = is_fsdp_managed_module(self) or is_deepspeed_zero3_enabled()
        return chunk_length is not None or not (is_sharded or any(module.training for module in self.modules()))

    @property
    def _chunk_length(self) -> int:
        return self.config.segment_length * max(1, PREFILL_TOKENS // self.config.segment_length)

    def _read_in_chunks(
        self, inputs: dict, cache: InfiniCache | None, kept: int | torch.Tensor, chunk_length: int | None, kwargs: dict
    ) -> BaseModelOutputWithPast:
        """
        The hidden states of the columns that are `kept`, the last so many or those numbered in `(B, K)`, of a long
        call that is read chunk after chunk in bounded memory.
        """
        states = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        length, chunk_length = states.shape[1], self._chunk_length if chunk_length is None else chunk_length
        if isinstance(kept, int):
            kept = torch.arange(max(0, length - kept), length, device=states.device).unsqueeze(0)
        written = _split_length(int(kept.min()), chunk_length)
        lengths = [*written, *_split_length(length - sum(written), chunk_length)]
        cache = self.new_cache() if cache is None else cache
        hidden_states = None
        for index, chunk in enumerate(split_call(inputs, lengths, cache.tokens_read)):
            writes_only = index < len(written)
            outputs = self.model(**chunk, past_key_values=cache, writes_only=writes_only, **kwargs)
            if not writes_only:
                columns = (kept - sum(lengths[:index])).to(outputs.last_hidden_state.device)
                found = take(outputs.last_hidden_state, columns.clamp(0, lengths[index] - 1))
                is_here = ((columns >= 0) & (columns < lengths[index])).unsqueeze(-1)
                hidden_states = torch.where(is_here, found, 0 if hidden_states is None else hidden_states)
        return BaseModelOutputWithPast(hidden_states, **{CACHE_NAME: cache})  # type: ignore[arg-type]


def _split_length(length: int, chunk_length: int) -> list[int]:
    return [min(chunk_length, length - start) for start in range(0, length, chunk_length)]


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
        if kwargs.get("context_parallel") is not None:
            raise ValueError(
                "context_parallel is for InfiniForCausalLM and InfiniModel: the loss of other heads does not add up "
                "over the ranks."
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
                tokens = last_tokens(attention_mask, input_ids.shape[1])
                input_ids = input_ids.masked_fill(~tokens, pad_token_id)
            elif not last_tokens(attention_mask, 1).all():
                raise ValueError(
                    "The last column is classified, and it is padding in some row: pad inputs_embeds on the left; "
                    "for input_ids, set config.pad_token_id."
                )
        return super().forward(input_ids, attention_mask, *args, **kwargs)


class InfiniForTokenClassification(BaseModelByAutoModel, GenericForTokenClassification, InfiniPreTrainedModel): ...


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
