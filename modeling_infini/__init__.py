"""Infini-attention for Hugging Face transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .cache import InfiniCache, state_nbytes
from .configuration_infini import InfiniConfig
from .context_parallel import ContextParallel
from .model_card_infini import model_card
from .modeling_infini import (
    InfiniForCausalLM,
    InfiniForQuestionAnswering,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniModel,
    InfiniPreTrainedModel,
)


AutoConfig.register(InfiniConfig.model_type, InfiniConfig, exist_ok=True)
AutoModel.register(InfiniConfig, InfiniModel, exist_ok=True)
AutoModelForCausalLM.register(InfiniConfig, InfiniForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(InfiniConfig, InfiniForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(InfiniConfig, InfiniForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(InfiniConfig, InfiniForQuestionAnswering, exist_ok=True)

__all__ = [
    "ContextParallel",
    "InfiniCache",
    "InfiniConfig",
    "InfiniForCausalLM",
    "InfiniForQuestionAnswering",
    "InfiniForSequenceClassification",
    "InfiniForTokenClassification",
    "InfiniModel",
    "InfiniPreTrainedModel",
    "model_card",
    "state_nbytes",
]
