"""What a checkpoint is: read from its configuration and its gates, without loading the model."""

import os
from dataclasses import dataclass

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from modeling_infini import InfiniConfig, state_nbytes

from .checkpoints import Checkpoint


# A head's share of local attention, from none to all.
LEVELS = "▁▂▃▄▅▆▇█"


@dataclass
class Inspection:
    """
    An Infini-attention checkpoint.

    Attributes:
        config: its configuration.
        parameters: how many there are.
        local_shares: what the gates give to local attention, `(num_hidden_layers, num_attention_heads)`.
        state_nbytes: bytes of memory state per sequence.
    """

    config: InfiniConfig
    parameters: int
    local_shares: torch.Tensor
    state_nbytes: int

    def __rich__(self) -> Group:
        return Group(self._facts(), "", self._gates())

    def _facts(self) -> Table:
        config = self.config
        origin = config.converted_from or {}
        key_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        full_attention_token = key_values * dtype.itemsize
        tied = ", tied embeddings" if config.tie_word_embeddings else ""
        local = f"the last {config.segment_length:,} tokens and {config.num_sink_tokens} attention sinks"
        rows = {
            "model": f"{', '.join(config.architectures or ['?'])}, {self.parameters / 1e6:,.1f} M parameters, "
            f"{str(config.dtype).removeprefix('torch.')}",
            "architecture": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size:,}, "
            f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of "
            f"{config.head_dim}, vocabulary {config.vocab_size:,}{tied}",
            "converted from": ", ".join(
                str(origin[name]) for name in ("name", "model_type", "revision", "license") if origin.get(name)
            )
            or "nothing: made as an Infini-attention model",
            "segments": f"{config.segment_length:,} tokens; the base was trained on "
            f"{config.max_position_embeddings:,} positions",
            "local attention": f"{config.local_attention}: "
            + (local if config.is_sliding else "the tokens of the own segment"),
            "memory": f"{'delta' if config.use_mem_delta_rule else 'linear'} rule"
            + (", learned write strength" if config.learned_delta_update else ""),
            "state": f"{self.state_nbytes / 1e6:,.1f} MB per sequence, whatever its length; full attention keeps as "
            f"much for {self.state_nbytes / full_attention_token:,.0f} tokens",
        }
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def _gates(self) -> Table:
        shares = self.local_shares
        table = Table(
            title="Gates: share of local attention, the rest is read from the memory", title_justify="left", box=None
        )
        for name in ("layer", "mean", "min", "max"):
            table.add_column(name, justify="right")
        table.add_column(f"heads ({LEVELS[0]} memory … {LEVELS[-1]} local)")
        for index, layer in enumerate(shares):
            levels = (layer * len(LEVELS)).long().clamp(max=len(LEVELS) - 1)
            bar = "".join(LEVELS[level] for level in levels.tolist())
            table.add_row(str(index), *(f"{s:.1%}" for s in (layer.mean(), layer.min(), layer.max())), Text(bar))
        table.add_section()
        table.add_row("all", *(f"{share:.1%}" for share in (shares.mean(), shares.min(), shares.max())), "")
        return table


def inspect_checkpoint(source: str | os.PathLike, revision: str | None = None) -> Inspection:
    """
    Args:
        source: a folder with an Infini-attention checkpoint, or its id on the Hub.
        revision: of a model on the Hub.

    Raises:
        ValueError: if it is no Infini-attention checkpoint.
    """
    checkpoint = Checkpoint(source, revision)
    config = checkpoint.infini_config
    return Inspection(
        config,
        sum(shape.numel() for shape in checkpoint.shapes.values()),
        _local_shares(checkpoint),
        state_nbytes(config),
    )


def _local_shares(checkpoint: Checkpoint) -> torch.Tensor:
    """What the gates of an Infini-attention checkpoint give to local attention, `(layers, heads)`."""
    names = {
        int(name.split(".layers.")[1].split(".")[0]): name
        for name in checkpoint.shapes
        if name.endswith("self_attn.head_gates.weight")
    }
    if sorted(names) != list(range(checkpoint.config.num_hidden_layers)):
        raise ValueError(f"{checkpoint.folder} lacks the gates of some layers: it is no whole checkpoint.")
    logits = torch.stack([checkpoint.read(names[layer]).float() for layer in sorted(names)])
    return torch.sigmoid(checkpoint.config.head_gate_scale * logits)
