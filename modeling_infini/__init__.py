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


def __getattr__(name: str):
    # Training is imported when it is asked for: the Trainer is slow to import, and of no use to who only reads.
    if name == "InfiniTrainer":
        from .training import InfiniTrainer

        return InfiniTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "InfiniCache",
    "InfiniConfig",
    "InfiniForCausalLM",
    "InfiniForQuestionAnswering",
    "InfiniForSequenceClassification",
    "InfiniForTokenClassification",
    "InfiniModel",
    "InfiniPreTrainedModel",
    "InfiniTrainer",
    "state_nbytes",
]
