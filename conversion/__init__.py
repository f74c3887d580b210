"""Between pretrained checkpoints and Infini-attention."""

from .from_infini import convert_from_infini
from .from_lucidrains import load_lucidrains
from .in_place import apply_memory
from .memory_weights import load_memory, save_memory
from .to_infini import convert_to_infini
from .transfer import transfer


__all__ = [
    "apply_memory",
    "convert_from_infini",
    "convert_to_infini",
    "load_lucidrains",
    "load_memory",
    "save_memory",
    "transfer",
]
