"""
How far a conversion moves the perplexity of a long text before any training: for both kinds of local attention, with
and without sinks, at several segment lengths and starts of the gates, against the source with full attention.

    infini evaluate at_conversion                          # SmolLM2-135M on the King James Bible
    infini evaluate at_conversion --text book.txt --model path/or/hub-id
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from modeling_infini import InfiniForCausalLM

from .loading import add_text_arguments, first_tokens, load_model, load_tokenizer, read_texts
from .losses import token_losses
from .resources import smollm2_file


SEGMENT_LENGTHS = (256, 512, 1024)
LOCAL_ATTENTION: dict[str, dict[str, Any]] = {
    "segment": {"local_attention": "segment", "num_sink_tokens": 0},
    "sliding, no sinks": {"local_attention": "sliding", "num_sink_tokens": 0},
    "sliding, 4 sinks": {"local_attention": "sliding", "num_sink_tokens": 4},
}
# Logits; at infinity the memory is shut out.
GATES = (0.0, 2.0, 4.0, math.inf)
CHUNK = 1024


def perplexity(model: PreTrainedModel, ids: torch.Tensor, start: int) -> float:
    """Perplexity of the tokens from `start` on, `ids` `(1, tokens)`, each given all before it."""
    return math.exp(token_losses(model, ids, CHUNK)[start - 1 :].mean().item())


def set_gates(model: InfiniForCausalLM, logit: float) -> None:
    for name, weight in model.named_parameters():
        if name.endswith("head_gates.weight"):
            weight.data.fill_(logit / model.config.head_gate_scale)


def _require_tokens(ids: dict[str, torch.Tensor], start: int, longest: int) -> None:
    """What is scored is there, and within what the source was trained on."""
    if start < 1:
        raise ValueError(f"--start {start}: nothing predicts the first token, so that scoring starts at 1 at least.")
    for name, text_ids in ids.items():
        if text_ids.shape[1] <= start:
            raise ValueError(f"{name}: {text_ids.shape[1]:,} tokens are read, and scoring starts at {start:,}.")
        if text_ids.shape[1] > longest:
            raise ValueError(
                f"Full attention cannot read {text_ids.shape[1]:,} tokens: the source was trained on {longest:,}. "
                "Take fewer --tokens."
            )


def measure(source: str, texts: dict[str, str], tokens: int, start: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        infini, base = Path(folder) / "infini", Path(folder) / "base"
        convert_to_infini(source, infini, segment_length=min(SEGMENT_LENGTHS))
        convert_from_infini(infini, base)
        ids = first_tokens(load_tokenizer(infini), texts, tokens)
        model = load_model(base)
        _require_tokens(ids, start, model.config.max_position_embeddings)
        full = {name: perplexity(model, text_ids, start) for name, text_ids in ids.items()}
        # A conversion refuses longer ones.
        lengths = [n for n in SEGMENT_LENGTHS if 2 * n + 4 <= model.config.max_position_embeddings]
        rows = [(n, local) for n in lengths for local in LOCAL_ATTENTION]
        found = {}
        with tqdm(total=len(rows) * len(GATES) * len(ids), desc="perplexity", file=sys.stderr) as progress:
            for segment_length, local in rows:
                fields = {"segment_length": segment_length, **LOCAL_ATTENTION[local]}
                model = InfiniForCausalLM.from_pretrained(infini, **fields)
                for gate in GATES:
                    set_gates(model, gate)
                    for name, text_ids in ids.items():
                        found[segment_length, local, gate, name] = perplexity(model, text_ids, start)
                        progress.update()

    for name in ids:
        print(f"\n{name}: tokens {start:,} to {ids[name].shape[1]:,}; full attention: {full[name]:.1f}\n")
        heads = [f"gates at {gate:g} ({1 / (1 + math.exp(-gate)):.0%} local)" for gate in GATES]
        print("| N | local attention |", " | ".join(heads), "|")
        print("|---" * (2 + len(GATES)) + "|")
        for segment_length, local in rows:
            values = [f"{found[segment_length, local, gate, name]:.1f}" for gate in GATES]
            print(f"| {segment_length} | {local} |", " | ".join(values), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, .gguf file or Hub id of a model to convert")
    add_text_arguments(parser, tokens=4096)
    parser.add_argument("--start", type=int, default=1024, help="where scoring starts")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    measure(arguments.model or str(smollm2_file()), read_texts(arguments.text), arguments.tokens, arguments.start)


if __name__ == "__main__":
    main()
