"""Training of Infini-attention models: nothing of it is published with a model, which does not import it."""

from .backpropagation import backpropagate, loss_in_chunks
from .context_parallel import ContextParallel
from .documents import DocumentStreams, collate_documents, load_documents, tokenize_documents
from .trainer import InfiniTrainer, InfiniTrainingArguments, last_whole_checkpoint
from .write_sparsity import sparse_writes


__all__ = [
    "ContextParallel",
    "DocumentStreams",
    "InfiniTrainer",
    "InfiniTrainingArguments",
    "backpropagate",
    "collate_documents",
    "last_whole_checkpoint",
    "load_documents",
    "loss_in_chunks",
    "sparse_writes",
    "tokenize_documents",
]
