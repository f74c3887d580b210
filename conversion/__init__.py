"""From pretrained checkpoints to Infini-attention."""

from .to_infini import convert_to_infini


__all__ = ["convert_to_infini"]
