"""
What processes compute from models that are saved in a folder; `compute.py FOLDER` writes it beside each model.

    FOLDER / heads / NAME       tensor parallelism: each process has some of the heads
    FOLDER / rows / NAME        FSDP2 and DDP: each process has rows of its own
    FOLDER / training / CASE    a case of `train.py`, with tensor parallelism

`of_batch(model)`, `of_rows(model)` and `conversation(model, rank)` are what one process computes.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from several_processes.cpu_as_accelerator import use_cpu_as_accelerator
from several_processes.train import CASES, run
from tiny import random_ids
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_infini import InfiniForCausalLM, modeling_infini
from modeling_infini.training import backpropagate, sparse_writes


def batch(*lengths: int, columns: int | None = None) -> dict[str, torch.Tensor]:
    """Left-padded rows of these lengths, and their labels."""
    ends_at = max(lengths) if columns is None else columns
    ids = random_ids(len(lengths), ends_at, seed=ends_at)
    mask = (torch.arange(ends_at) >= ends_at - torch.tensor(lengths).unsqueeze(1)).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}


def packed() -> dict[str, torch.Tensor]:
    lengths = [[1, 6, 6], [11, 2]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return {"input_ids": random_ids(2, 13), "position_ids": positions, "labels": random_ids(2, 13)}


def calls() -> dict[str, dict[str, torch.Tensor]]:
    """Shorter than a segment of 5 tokens, as long and longer, of one row and two, padded and packed."""
    found = {}
    for length in (2, 5, 6, 13):
        for rows in (1, 2):
            ids = random_ids(rows, length)
            found[f"{rows} x {length}"] = {"input_ids": ids, "labels": ids}
    padded = batch(13, 8)
    found["left-padded"] = padded
    found["right-padded"] = {name: states.flip(1) for name, states in padded.items()}
    found["row of padding"] = batch(0, 13)
    found["packed"] = packed()
    return found


# What each of two processes has.
ROWS = {
    "within a segment, and longer": (batch(2, 3), batch(13, 7)),
    "longer, and within a segment": (batch(13, 7), batch(2, 1)),
    "both within a segment": (batch(2, 3), batch(4, 2)),
    "a row of padding": (batch(0, 3), batch(13, 0)),
    "padding alone": (batch(0, 0, columns=6), batch(13, 4)),
    "one row, and three": (batch(4), batch(13, 4, 2)),
    "packed": (packed(), batch(13, 4)),
}


def of_batch(model: InfiniForCausalLM) -> dict[str, torch.Tensor]:
    """Losses, logits and gradients of `calls`, of calls with a cache, and of what adds up; generated tokens."""
    results = {}
    ids = random_ids(2, 23)

    def add(name: str, **tensors: torch.Tensor) -> None:
        results.update({f"{name}: {key}": tensor.detach().clone() for key, tensor in tensors.items()})
        results.update({f"{name}: gradient of {key}": gradient for key, gradient in gradients(model).items()})

    model.train()
    for name, call in calls().items():
        outputs = model(**call, use_cache=False)
        outputs.loss.backward()
        add(name, loss=outputs.loss, logits=outputs.logits)
    for name in ("with a cache", "with a cache, checkpointed"):
        if name.endswith("checkpointed"):
            model.gradient_checkpointing_enable()
        cache = model.new_cache()
        logits = [model(part, past_key_values=cache).logits for part in ids.split([8, 1, 6, 8], 1)]
        torch.cat(logits, 1).square().mean().backward()
        add(name, logits=torch.cat(logits, 1))
    outputs = model(ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    add("checkpointed", loss=outputs.loss)
    model.gradient_checkpointing_disable()

    for row in ids.split(1):
        model(row, labels=row, use_cache=False).loss.backward()
    add("accumulated")
    loss, _ = backpropagate(model, {"input_ids": ids, "labels": ids}, chunk_segments=2)
    add("in chunks", loss=loss)
    if model.config.memory_write_gate:
        with sparse_writes(model, 0.7, margin=1.5):
            model(ids, use_cache=False).logits.square().mean().backward()
        add("sparse writes")

    model.eval()
    with torch.no_grad():
        cache = model.new_cache()
        logits = [model(part, past_key_values=cache).logits for part in ids.split([8, 1, 6, 8], 1)]
        generated = model.generate(ids, attention_mask=batch(23, 17)["attention_mask"], max_new_tokens=12)
        beams = model.generate(ids, num_beams=2, max_new_tokens=7)
        add("in calls", logits=torch.cat(logits, 1), generated=generated, beams=beams, shares=model.local_shares())
    return results


def of_rows(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of `ROWS`: of this process's rows, averaged as data parallelism does, or of all rows at once."""
    results = {}
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    for name, rows in ROWS.items():
        targets = sum((call["labels"][:, 1:] != -100).sum() for call in rows)
        mine = rows if world == 1 else [rows[distributed.get_rank()]]
        for is_training in (True, False):
            model.train(is_training)
            losses = [model(**call, num_items_in_batch=targets, use_cache=False).loss for call in mine]
            (sum(losses) * world).backward()
            mode = "training" if is_training else "evaluation"
            results |= {f"{name}, {mode}: {key}": gradient for key, gradient in gradients(model).items()}
    return results


def conversation(model: InfiniForCausalLM, rank: int) -> dict[str, torch.Tensor]:
    """Two turns with a cache, of other lengths and other numbers of calls in each process."""
    cache = model.new_cache()
    turns = [
        model.generate(random_ids(1, 4 + 19 * rank, seed=turn), past_key_values=cache, max_new_tokens=3 + 4 * rank)
        for turn in range(2)
    ]
    return {"turns": torch.cat(turns, 1), "tokens read": cache.tokens_read}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole gradients, which are taken away."""
    found = {
        name.removeprefix("module."): whole(parameter.grad).clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(folder: str) -> None:
    torch.set_num_threads(1)
    use_cpu_as_accelerator()
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()

    def load(path: Path, **sizes: int) -> InfiniForCausalLM:
        return InfiniForCausalLM.from_pretrained(
            path, distributed_config=DistributedConfig(**sizes) if sizes else None
        )

    for path in sorted(Path(folder, "heads").iterdir()):
        model = load(path, tp_size=world)
        results = of_batch(model)
        results["gates here"] = model.model.layers[1].self_attn.head_gates.weight.to_local().detach().clone()
        save_file(results, path / f"results-{rank}.safetensors")
        model.save_pretrained(path / "saved")
    # Prompts of more than a segment are read in several calls, where that is allowed.
    modeling_infini.PIECE_TOKENS = 1
    for path in sorted(Path(folder, "rows").iterdir()):
        model = load(path, fsdp_size=world)
        save_file(of_rows(model) | conversation(model.eval(), rank), path / f"fsdp2-{rank}.safetensors")
        model.save_pretrained(path / "saved")
        save_file(of_rows(DistributedDataParallel(load(path))), path / f"ddp-{rank}.safetensors")
    for path in sorted(Path(folder, "training").iterdir()):
        results = run(CASES[path.name], path, load(path, tp_size=world))
        (path / f"results-{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
