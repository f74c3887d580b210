"""
A plugin for vLLM, which serves Infini-attention models with its batching, scheduler and server.

vLLM finds `register` by its entry point `vllm.general_plugins`; nobody has to import this package.
"""

from vllm import ModelRegistry
from vllm.config import CompilationConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

# Registers the configuration with AutoConfig, before code that comes with a checkpoint.
from modeling_infini import InfiniConfig

from .settings import ARCHITECTURE, BACKEND, OPERATOR, InfiniArchitecture, InfiniSettings


def register() -> None:
    """Makes the model known. vLLM calls it in each of its processes, maybe more than once."""
    if BACKEND in MambaAttentionBackendEnum.__members__:
        return
    register_backend(BACKEND, f"{__name__}.backend.InfiniBackend", is_mamba=True)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = InfiniSettings
    MODEL_ARCH_CONFIG_CONVERTORS[InfiniConfig.model_type] = InfiniArchitecture
    # CUDA graphs end before the operator and go on after it: what it does depends on the requests.
    CompilationConfig._attention_ops.append(f"vllm::{OPERATOR}")
