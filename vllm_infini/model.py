"""The model: vLLM's Llama around this project's attention with memory."""

from collections.abc import Iterable

import torch
from transformers.initialization import no_init_weights
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index, maybe_prefix
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from modeling_infini import InfiniConfig
from modeling_infini.modeling_infini import FORMER_NAMES, InfiniAttention

from .backend import Call, Step, serving_config
from .settings import BACKEND, OPERATOR
from .states import PagedLayer, states_of_page


class PagedInfiniAttention(MambaBase, InfiniAttention):
    """
    `InfiniAttention` with vLLM's projections around it, whose states stand in vLLM's pages. A process has the KV heads
    of its rank, their query heads, and all that the memory has of these heads.
    """

    kv_cache: tuple[torch.Tensor, ...] = ()

    def __init__(
        self, *, config: InfiniConfig, quant_config: QuantizationConfig | None, prefix: str, **arguments_of_llama
    ):
        with no_init_weights():
            own_heads = serving_config(config, get_tensor_model_parallel_world_size())
            InfiniAttention.__init__(self, own_heads, extract_layer_index(prefix))
        del self.q_proj, self.k_proj, self.v_proj
        heads, biases = config.num_attention_heads, config.projection_biases
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            heads,
            config.num_key_value_heads,
            bias=biases["qkv_bias"],
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * config.head_dim,
            config.hidden_size,
            bias=biases["attention_output_bias"],
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        if self.has_memory:
            for parameter in (*self.head_gates.parameters(), *self.memory.parameters()):
                set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})

        self.prefix = prefix
        vllm_config = get_current_vllm_config()
        self.page = states_of_page(self.config, vllm_config.model_config.dtype)
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(state.shape) for state in self.page.values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(state.dtype for state in self.page.values())

    def forward(  # type: ignore[override]
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """`(tokens, hidden_size)` of all requests of a step -> the same."""
        qkv, _ = self.qkv_proj(hidden_states)
        output = qkv.new_zeros(qkv.shape[0], self.config.num_attention_heads * self.head_dim)
        torch.ops.vllm.infini_attention(hidden_states, qkv, output, self.prefix)
        return self.o_proj(output)[0]

    def read(self, step: Step, hidden_states: torch.Tensor, qkv: torch.Tensor, output: torch.Tensor) -> None:
        """Reads a step into the states; `output` `(tokens, heads * head_dim)` gets what its tokens attend to."""
        pages = dict(zip(self.page, self.kv_cache))
        for page in pages.values():
            page[step.new_requests] = 0
        for call in step.calls:
            output[call.tokens] = self._attend(call, pages, hidden_states[call.tokens], qkv[call.tokens])

    def _attend(
        self, call: Call, pages: dict[str, torch.Tensor], hidden_states: torch.Tensor, qkv: torch.Tensor
    ) -> torch.Tensor:
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        queries, keys, values = qkv.view(*call.shape, -1, self.head_dim).split([heads, kv_heads, kv_heads], 2)
        past = PagedLayer(self.config, self.layer_idx, pages, call.requests)
        attended, _ = self.attend(
            hidden_states.view(*call.shape, -1), queries, keys, values, call.angles, call.mask, call.layout, past
        )
        return attended.reshape(hidden_states.shape[0], -1)


@eager_break_during_capture
def infini_attention(hidden_states: torch.Tensor, qkv: torch.Tensor, output: torch.Tensor, layer_name: str) -> None:
    """A layer's attention with memory, which compilers do not look into."""
    context = get_forward_context()
    # While vLLM measures how much memory a step takes there are no requests.
    if context.attn_metadata is not None:
        layer = context.no_compile_layers[layer_name]
        layer.read(context.attn_metadata[layer_name], hidden_states, qkv, output)


def _infini_attention_fake(
    hidden_states: torch.Tensor, qkv: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    return


direct_register_custom_op(OPERATOR, infini_attention, mutates_args=["output"], fake_impl=_infini_attention_fake)


class InfiniDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, prefix, attn_layer_type=PagedInfiniAttention)


class InfiniForCausalLM(LlamaForCausalLM, HasInnerState, IsAttentionFree):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=InfiniDecoderLayer)
        config = vllm_config.model_config.hf_config
        if config.lm_head_bias and get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                bias=True,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)

    def get_mamba_state_copy_funcs(self, mamba_types: set[MambaAttentionBackendEnum]) -> dict:
        """How prefix caching copies each state of a page: as a whole."""
        layer = self.model.layers[self.model.start_layer].self_attn
        return dict.fromkeys(mamba_types, (get_temporal_copy_spec,) * len(layer.get_state_shape()))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.lm_head, hidden_states, self.lm_head.bias, skip_gather=True)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights((FORMER_NAMES.rename_source_key(name)[0], weight) for name, weight in weights)
