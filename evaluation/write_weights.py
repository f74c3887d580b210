"""
Which tokens of a text a memory holds: how much each adds to it, and which add most.

    infini evaluate write_weights checkpoints/passkey --filler moby_dick.txt --tokens 131072
    infini evaluate write_weights tuned --filler bible --tokens 65536 --no-passkey --top 10

A read is an average over all that was written, each token weighted by its key. So what is to be found later has to
weigh more than everything else together: a passkey is hidden in the middle, and its tokens are compared with the rest.
Under the delta rule, a token adds what the memory does not return for its key already, and weights are an upper bound.
Of memory slots, which hold tokens as they are, nothing is said.
"""

import argparse
from contextlib import ExitStack
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_infini.memory import feature_map
from modeling_infini.modeling_infini import log_write_gates

from .examples import opening_ids
from .haystacks import encode, find_filler
from .loading import load_model, load_tokenizer
from .passkey import passkey_example
from .wordings import PAPER_WORDING


CALL_LENGTH = 4096
CONTEXT = 10


@torch.no_grad()
def write_weights(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """
    log of the sum over the features of k, what each token adds to z, `(layers, kv_heads, tokens)`, read in constant
    memory; `layers` are those that have a memory.

    Args:
        input_ids: `(1, tokens)`.
    """
    weights: list[list[torch.Tensor]] = []
    cache = model.new_cache()  # type: ignore[operator]
    with ExitStack() as hooks:
        for layer in model.config.layers_with_memory:
            weights.append([])
            _follow(model.model.layers[layer].self_attn, weights[-1], hooks)
        for call in input_ids.split(CALL_LENGTH, 1):
            model(call, past_key_values=cache, logits_to_keep=1)
    return torch.stack([torch.cat(of_layer, 1) for of_layer in weights])


def _follow(attention: Any, weights: list[torch.Tensor], hooks: ExitStack) -> None:
    """Appends the log weights `(kv_heads, tokens)` of each call of a layer's attention."""
    config, seen = attention.config, {}

    def keep(name: str):
        def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            seen[name] = output

        return hook

    def after(module: nn.Module, arguments: tuple, output: Any) -> None:
        keys = seen["keys"].float().unflatten(-1, (-1, config.head_dim)) if seen["keys"].dim() == 3 else seen["keys"]
        if config.memory_write_gate:
            keys = keys + log_write_gates(seen["gate"]).unsqueeze(-1)
        # The map of "exp" gives the logarithms of its features.
        is_log = config.memory_feature_map == "exp"
        log_sums = keys.float().logsumexp(-1) if is_log else feature_map(keys.float()).sum(-1).log()
        weights.append(log_sums[0].T)

    source = attention.k_norm if config.qk_norm else attention.k_proj
    if config.memory_norm_init_scale is not None:
        source = attention.memory.key_norm
    if config.memory_feature_map == "exp":
        source = attention.memory.key_map
    hooks.callback(source.register_forward_hook(keep("keys")).remove)
    if config.memory_write_gate:
        hooks.callback(attention.memory.write_gate.register_forward_hook(keep("gate")).remove)
    hooks.callback(attention.register_forward_hook(after).remove)


def find(ids: torch.Tensor, part: torch.Tensor) -> slice:
    """
    Where `part` `(length,)` stands in `ids` `(tokens,)` for the first time.

    Raises:
        ValueError: if it does not.
    """
    starts = (ids.unfold(0, len(part), 1) == part).all(1).nonzero()
    if not len(starts):
        raise ValueError("The tokens do not stand in the text.")
    return slice(int(starts[0]), int(starts[0]) + len(part))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("--filler", default="bible", help='"bible", "sentence" or a text file (default: %(default)s)')
    parser.add_argument("--tokens", type=int, default=65_536, help="(default: %(default)s)")
    parser.add_argument(
        "--top", type=int, default=3, help="tokens of the filler to show per head (default: %(default)s)"
    )
    parser.add_argument(
        "--passkey", action=argparse.BooleanOptionalAction, default=True, help="hide one in the middle"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model).eval(), load_tokenizer(options.model)
    filler = find_filler(tokenizer, options.filler)
    if options.passkey:
        generator = np.random.default_rng(options.seed)
        example = passkey_example(tokenizer, filler, options.tokens, 0.5, generator, PAPER_WORDING)
        ids = example.input_ids
        needle = find(ids, encode(tokenizer, " " + PAPER_WORDING.needle.format(key=example.facts["answer"])))
        # The question and the answer are not in the way of themselves.
        rest = torch.ones(len(ids), dtype=torch.bool)
        rest[needle] = False
        rest[-model.config.segment_length :] = False
    else:
        ids = torch.cat([opening_ids(tokenizer), filler.ids])[: options.tokens]
        rest = torch.ones(len(ids), dtype=torch.bool)
    weights = write_weights(model, ids.unsqueeze(0)).double()
    columns = ["layer", "head", "median", "99.9 %", "all filler"] + ["passkey, most", "passkey, all"] * options.passkey
    print(f"log of what tokens add to z, {len(ids):,} tokens of {filler.name}\n")
    print(f"| {' | '.join(columns)} | tokens of the filler that add most |")
    print("|--:" * len(columns) + "|---|")
    heads = product(model.config.layers_with_memory, range(model.config.num_key_value_heads))
    for (layer, head), own in zip(heads, weights.flatten(0, 1)):
        filled = own[rest]
        # np.quantile: torch's takes no more than 16 million.
        numbers = [filled.median().item(), float(np.quantile(filled, 0.999)), filled.logsumexp(0).item()]
        if options.passkey:
            numbers += [own[needle].max().item(), own[needle].logsumexp(0).item()]
        top = own.masked_fill(~rest, -torch.inf).topk(options.top)
        shown = (
            f"{weight:.1f} `{str(tokenizer.decode(ids[max(0, place - CONTEXT) : place + 1])).strip()!r}`"
            for weight, place in zip(top.values.tolist(), top.indices.tolist())
        )
        print(f"| {layer} | {head} | {' | '.join(f'{x:.1f}' for x in numbers)} | {'; '.join(shown)} |")


if __name__ == "__main__":
    main()
