"""Infini-attention for Hugging Face transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .backpropagation import backpropagate, loss_in_chunks
from .cache import InfiniCache, state_nbytes
from .configuration_infini import InfiniConfig
from .context_parallel import ContextParallel
from .cpu_kernels import use_cpu_kernels
from .documents import DocumentStreams, collate_documents, load_documents, tokenize_documents
from .model_card_infini import model_card
from .modeling_infini import (
    InfiniForCausalLM,
    InfiniForQuestionAnswering,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniModel,
    InfiniPreTrainedModel,
)
from .write_sparsity import sparse_writes


AutoConfig.register(InfiniConfig.model_type, InfiniConfig, exist_ok=True)
AutoModel.register(InfiniConfig, InfiniModel, exist_ok=True)
AutoModelForCausalLM.register(InfiniConfig, InfiniForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(InfiniConfig, InfiniForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(InfiniConfig, InfiniForTokenClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(InfiniConfig, InfiniForQuestionAnswering, exist_ok=True)


def __getattr__(name: str):
    # The Trainer is imported when it is asked for: it is slow to import, and of no use to who only reads.
    if name in ("InfiniTrainer", "InfiniTrainingArguments", "last_whole_checkpoint"):
        from . import trainer_infini

        return getattr(trainer_infini, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ContextParallel",
    "DocumentStreams",
    "InfiniCache",
    "InfiniConfig",
    "InfiniForCausalLM",
    "InfiniForQuestionAnswering",
    "InfiniForSequenceClassification",
    "InfiniForTokenClassification",
    "InfiniModel",
    "InfiniPreTrainedModel",
    "InfiniTrainer",
    "InfiniTrainingArguments",
    "backpropagate",
    "collate_documents",
    "last_whole_checkpoint",
    "load_documents",
    "loss_in_chunks",
    "model_card",
    "sparse_writes",
    "state_nbytes",
    "tokenize_documents",
    "use_cpu_kernels",
]
