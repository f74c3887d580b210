"""Between pretrained checkpoints and Infini-attention."""

from .from_infini import convert_from_infini
from .from_lucidrains import load_lucidrains
from .to_infini import convert_to_infini


__all__ = ["convert_from_infini", "convert_to_infini", "load_lucidrains"]
