"""What vLLM is told of the model before it loads weights: what it cannot do, and how long its texts may be."""

from vllm.config import VllmConfig
from vllm.model_executor.models.config import MambaModelConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase


ARCHITECTURE = "InfiniForCausalLM"
BACKEND = "INFINI"
OPERATOR = "infini_attention"


class InfiniArchitecture(ModelArchConfigConvertorBase):
    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        # No position grows with the length of a text: `max_position_embeddings` of the base does not bound it.
        return float("inf"), None


class InfiniSettings(MambaModelConfig):
    """State of constant size for each request, as Mamba has it; `"align"` is its prefix caching."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Raises ValueError for what the model cannot do; the message names it."""
        parallel, kv_heads = vllm_config.parallel_config, vllm_config.model_config.hf_config.num_key_value_heads
        refused = {
            "Speculative decoding: tokens that are not accepted cannot be taken out of a memory. Leave out "
            "speculative_config.": vllm_config.speculative_config is not None,
            "Context parallelism (decode_context_parallel_size, prefill_context_parallel_size): there are no keys of "
            "a whole text to share out. Leave both at 1.": parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1,
            f"tensor_parallel_size={parallel.tensor_parallel_size} does not divide num_key_value_heads={kv_heads}: "
            "each process gets whole KV heads with their memory.": kv_heads % parallel.tensor_parallel_size != 0,
            "Pooling: only generation is served. Leave out runner and convert.": (
                vllm_config.model_config.runner_type != "generate"
            ),
            "KV connectors (kv_transfer_config): they move keys, and no memory.": (
                vllm_config.kv_transfer_config is not None
            ),
            'mamba_cache_mode="all": states are kept at the ends of blocks alone. Choose "align".': (
                vllm_config.cache_config.mamba_cache_mode == "all"
            ),
        }
        for message, is_asked_for in refused.items():
            if is_asked_for:
                raise ValueError(f"{ARCHITECTURE} cannot be served so. {message}")
        super().verify_and_update_config(vllm_config)
