"""What vLLM is told of the model before it loads weights: what it cannot do, and how long its texts may be."""

from collections.abc import Iterator

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
        try:
            # vLLM sets fields that it is given after the configuration was validated.
            vllm_config.model_config.hf_config.validate_architecture()
        except ValueError as error:
            raise ValueError(f"{ARCHITECTURE} cannot be served so. {error}") from error
        if (reason := next(_refusals(vllm_config), None)) is not None:
            raise ValueError(f"{ARCHITECTURE} cannot be served so. {reason}")
        super().verify_and_update_config(vllm_config)


def _refusals(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    kv_heads, processes = vllm_config.model_config.hf_config.num_key_value_heads, parallel.tensor_parallel_size
    if vllm_config.speculative_config is not None:
        yield "Tokens that are not accepted cannot be taken out of a memory: leave out speculative_config."
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        yield (
            "There are no keys of a whole text to share out: leave decode_context_parallel_size and "
            "prefill_context_parallel_size at 1."
        )
    if kv_heads % processes:
        yield (
            f"tensor_parallel_size={processes} does not divide num_key_value_heads={kv_heads}: each process gets "
            "whole KV heads with their memory. Choose one that does."
        )
    if vllm_config.model_config.runner_type != "generate":
        yield "Pooling was not tried: leave out runner and convert."
    if vllm_config.kv_transfer_config is not None:
        yield "KV connectors were not tried with memories: leave out kv_transfer_config."
    if vllm_config.cache_config.kv_offloading_size is not None:
        yield "Pages of memories were not tried elsewhere than in the GPU: leave out kv_offloading_size."
    for name in ("cache_dtype", "mamba_cache_dtype", "mamba_ssm_cache_dtype"):
        if (dtype := getattr(vllm_config.cache_config, name)) != "auto":
            setting = "kv_cache_dtype" if name == "cache_dtype" else name
            yield f"{setting}={dtype}: keys are kept in the dtype of the model, and M and z in float32."
