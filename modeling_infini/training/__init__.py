"""Training of Infini-attention models: nothing of it is published with a model, which does not import it."""

from .backpropagation import backpropagate, loss_in_chunks
from .context_parallel import ContextParallel
from .distillation import DistillationTrainer, divergence, train_memory_alone, window_states
from .documents import DocumentStreams, collate_documents, load_documents, load_held_out, tokenize_documents
from .trainer import InfiniTrainer, InfiniTrainingArguments, last_whole_checkpoint, record_run
from .write_sparsity import sparse_writes


__all__ = [
    "ContextParallel",
    "DistillationTrainer",
    "DocumentStreams",
    "InfiniTrainer",
    "InfiniTrainingArguments",
    "backpropagate",
    "collate_documents",
    "divergence",
    "last_whole_checkpoint",
    "load_documents",
    "load_held_out",
    "loss_in_chunks",
    "record_run",
    "sparse_writes",
    "tokenize_documents",
    "train_memory_alone",
    "window_states",
]
