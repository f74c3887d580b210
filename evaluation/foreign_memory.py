"""
Whether a memory helps by what it holds of this very text: losses of a text with its own memory, with that of another
text in its place, and with the memory off. A memory that only adds what any text would does as well with another's.

    python -m evaluation.foreign_memory tuned/merged --text moby_dick.txt --other emma.txt --tokens 4096
"""

import argparse
import copy
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from modeling_infini import InfiniCache

from .loading import load_model, load_tokenizer
from .losses import memory_off


CHUNK = 1024
# Losses of neighbouring tokens are correlated; means of so many tokens are taken to be independent.
BLOCK = 256


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor) -> InfiniCache:
    """The cache after `ids` `(1, tokens)`."""
    cache = model.new_cache()  # type: ignore[operator]
    for chunk in ids.split(CHUNK, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def losses_after(
    model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor, past: InfiniCache, held: InfiniCache
) -> torch.Tensor:
    """
    Losses `(tokens,)` of `targets` `(1, tokens)`, one ahead of `ids`, read on from `past`, whose memory is that of
    `held` before each chunk: it does not grow by what is read.
    """
    cache = copy.deepcopy(past)
    losses = []
    for chunk, target in zip(ids.split(CHUNK, 1), targets.split(CHUNK, 1)):
        for layer, other in zip(cache.layers, held.layers):
            layer.memory, layer.normaliser = other.memory.clone(), other.normaliser.clone()
        logits = model(chunk, past_key_values=cache).logits[0]
        losses.append(cross_entropy(logits.float(), target[0], reduction="none"))
    return torch.cat(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True, help="the text whose memory is put in place")
    parser.add_argument("--tokens", type=int, default=4096, help="to remember, and to score after them")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    text, other = (
        torch.tensor([tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]])
        for path in (options.text, options.other)
    )
    count = options.tokens // CHUNK * CHUNK
    if count == 0 or text.shape[1] <= 2 * count or other.shape[1] < count:
        parser.error(f"--tokens must be at least {CHUNK}, with twice as many in --text and as many in --other.")

    own, foreign = read(model, text[:, :count]), read(model, other[:, :count])
    scored, targets = text[:, count : 2 * count], text[:, count + 1 : 2 * count + 1]
    losses = {
        "own": losses_after(model, scored, targets, own, own),
        f"{options.other.stem}'s": losses_after(model, scored, targets, own, foreign),
    }
    with memory_off(model):
        losses["none"] = losses_after(model, scored, targets, own, own)
    for name, values in losses.items():
        blocks = (values - losses["own"]).view(-1, BLOCK).mean(1)
        error = blocks.std() / len(blocks) ** 0.5
        print(f"memory: {name:12} NLL {values.mean():.4f}, minus own {blocks.mean():+.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
