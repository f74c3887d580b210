"""What a checkpoint is: read from its configuration and its gates, without loading the model."""

import os
from dataclasses import dataclass
from itertools import groupby

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from modeling_infini import InfiniConfig, state_nbytes

from .checkpoints import Checkpoint
from .model_card import memory_rule
from .to_infini import own_weights


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
        tokens = " (before what each token adds to it)" if self.config.token_gates else ""
        title = f"Gates: the share of local attention{tokens}; the rest is read from the memory"
        return Group(self._facts(), "", Text(title, style="bold"), self._gates())

    def _facts(self) -> Table:
        config = self.config
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
            "converted from": self._origin(),
            "segments": f"{config.segment_length:,} tokens{self._base_positions()}",
            "local attention": f"{config.local_attention}: "
            + (local if config.is_sliding else "the tokens of the own segment"),
            "memory": memory_rule(config) if config.layers_with_memory else "none",
            "memory layers": self._layers(config.layers_with_memory),
            "memory slots": f"{config.num_memory_slots:,} tokens per layer, chosen by a learned score"
            if config.num_memory_slots
            else "",
            "slot layers": self._layers(config.layers_with_slots) if config.num_memory_slots else "",
            "state": f"{self.state_nbytes / 1e6:,.1f} MB per sequence, whatever its length; full attention keeps as "
            f"much for {self.state_nbytes / full_attention_token:,.0f} tokens",
        }
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, value in rows.items():
            if not value:
                continue
            # Names and licences are of others: no markup.
            table.add_row(name, Text(value))
        return table

    def _layers(self, layers: list[int]) -> str:
        """Nothing where it is all of them."""
        count = self.config.num_hidden_layers
        return "" if len(layers) == count else f"{', '.join(map(str, layers)) or 'none'} of 0 to {count - 1}"

    def _origin(self) -> str:
        origin = self.config.converted_from
        if not origin:
            return "nothing: made as an Infini-attention model"
        if "package" in origin:
            return f"a model of the package {origin['package']}"
        model_type = f"a {origin['model_type']} checkpoint" if "model_type" in origin else "a checkpoint"
        known = [f"{name} {origin[name]}" for name in ("revision", "license") if name in origin]
        return ", ".join([f"{origin['name']}, {model_type}" if "name" in origin else model_type, *known])

    def _base_positions(self) -> str:
        if "model_type" not in (self.config.converted_from or {}):
            return ""
        return f"; the base was trained on {self.config.max_position_embeddings:,} positions"

    def _gates(self) -> Table:
        shares, with_memory = self.local_shares, self.config.layers_with_memory
        table = Table(box=None)
        for name in ("layer", "mean", "min", "max"):
            table.add_column(name, justify="right")
        table.add_column(f"heads ({LEVELS[0]} memory … {LEVELS[-1]} local)")
        gates = [shares[layer].tolist() if layer in with_memory else [] for layer in range(len(shares))]
        for alike, group in groupby(range(len(gates)), key=gates.__getitem__):
            layers = list(group)
            name = str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"
            if not alike:
                table.add_row(name, "", "", "", Text("no memory", style="dim"))
                continue
            levels = [min(int(share * len(LEVELS)), len(LEVELS) - 1) for share in alike]
            table.add_row(name, *_summary(shares[layers[0]]), Text("".join(LEVELS[level] for level in levels)))
        if with_memory:
            table.add_row("all", *_summary(shares[with_memory]), "", style="bold")
        return table


def _summary(shares: torch.Tensor) -> list[str]:
    return [f"{share:.1%}" for share in (shares.mean(), shares.min(), shares.max())]


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
        sum(shape.numel() for shape in own_weights(checkpoint, config).values()),
        _local_shares(checkpoint),
        state_nbytes(config),
    )


def _local_shares(checkpoint: Checkpoint) -> torch.Tensor:
    """What the gates of an Infini-attention checkpoint give to local attention, `(layers, heads)`."""
    config = checkpoint.config
    shares = torch.ones(config.num_hidden_layers, config.num_attention_heads)
    for layer in config.layers_with_memory:
        name = f"model.layers.{layer}.self_attn.head_gates.weight"
        found = [own for own in (name, name.removeprefix("model.")) if own in checkpoint.shapes]
        if not found:
            raise ValueError(f"{checkpoint.folder} lacks the gates of some layers: it is no whole checkpoint.")
        logits = checkpoint.read(found[0]).float()
        if not logits.isfinite().all():
            raise ValueError(f"{checkpoint.folder} has gates that are not finite: a training has gone wrong.")
        shares[layer] = torch.sigmoid(config.head_gate_scale * logits)
    return shares
