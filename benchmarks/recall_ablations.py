"""
What makes such a memory learn, and last: one small task, one budget, several seeds, one change at a time.

The task is associative recall: among the first 32 tokens are 8 that each stand for a pair of a key and a value, random
filler follows, and the last 32 tokens name the 8 keys in another order, each to be followed by its value. Chance is
1/16, and reading values without addressing them gives about 1/4. A small model (2 layers, width 64, 2 heads of 32)
trains on 64 tokens, then 128 and 256, the next when the last is mastered, and is tested on up to 65,536. Each run
takes about half a minute of one core.

    python -m benchmarks.recall_ablations --output docs/recall/ablations.jsonl

writes a line per run as soon as it is done, goes on after the last one when called again, and prints the table.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm
from transformers import get_scheduler

from modeling_infini import InfiniConfig, InfiniForCausalLM
from modeling_infini.training import backpropagate, sparse_writes


NUM_PAIRS = 8
NUM_KEYS, NUM_VALUES, NUM_FILLERS = 16, 16, 64
# A token for each pair of a key and a value; then keys, values, filler.
FIRST_KEY = NUM_KEYS * NUM_VALUES
FIRST_VALUE = FIRST_KEY + NUM_KEYS
FIRST_FILLER = FIRST_VALUE + NUM_VALUES
ENDS = 32
TRAINED_LENGTHS = (64, 128, 256)
TESTED_LENGTHS = (64, 256, 1024, 4096, 16384, 65536)
TOKENS_PER_STEP = 1024
MASTERED = 0.9
# Answers per length in a test, eight to a row.
TEST_ANSWERS = 256

MODEL = {
    "vocab_size": FIRST_FILLER + NUM_FILLERS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "segment_length": 32,
    "initializer_range": 0.05,
    "memory_eps": 1e-12,
    "bos_token_id": None,
    "eos_token_id": None,
}
NORM = {"memory_norm_init_scale": 3.0}
GATE = {**NORM, "memory_write_gate": True}
# What a run is called, its fields of the configuration, and the options of `train`.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as in the paper": ({}, {}),
    "+ memory norm (base)": (NORM, {}),
    "+ write gate": (GATE, {}),
    "+ write gate, sparse writes": (GATE, {"write_sparsity": 0.003}),
    "write gate alone": ({"memory_write_gate": True}, {}),
    "paper, delta rule": ({"use_mem_delta_rule": True}, {}),
    "base, delta rule": ({**NORM, "use_mem_delta_rule": True}, {}),
    "base, learned_delta_update": ({**NORM, "use_mem_delta_rule": True, "learned_delta_update": True}, {}),
    "base, gates start closed (4)": ({**NORM, "head_gate_init_value": 4.0}, {}),
    "base, gates start closed (4), head_gate_scale 1": (
        {**NORM, "head_gate_init_value": 4.0, "head_gate_scale": 1.0},
        {},
    ),
    "base, gates start open (-4)": ({**NORM, "head_gate_init_value": -4.0}, {}),
    "base, head_gate_scale 1": ({**NORM, "head_gate_scale": 1.0}, {}),
    "base, gates frozen half open": (NORM, {"freeze_gates": True}),
    "base, segments of 16": ({**NORM, "segment_length": 16}, {}),
    "base, segments of 64": ({**NORM, "segment_length": 64}, {}),
    "base, detach every segment": (NORM, {"detach_every_num_segments": 1}),
    "base, detach every 2 segments": (NORM, {"detach_every_num_segments": 2}),
    "base, detach every 4 segments": (NORM, {"detach_every_num_segments": 4}),
    "base, sliding": ({**NORM, "local_attention": "sliding"}, {}),
    "exp features": ({"memory_feature_map": "exp"}, {}),
    "base, exp features": ({**NORM, "memory_feature_map": "exp"}, {}),
    "base, gates per token": ({**NORM, "token_gates": True}, {}),
    "exp features, gates per token": ({"memory_feature_map": "exp", "token_gates": True}, {}),
    "exp features, gates per token, write gate": (
        {"memory_feature_map": "exp", "token_gates": True, "memory_write_gate": True},
        {},
    ),
    "base, memory in the upper layer alone": ({**NORM, "memory_layers": [1]}, {}),
    "base, sliding, 32 slots of the latest tokens": (
        {**NORM, "local_attention": "sliding", "num_memory_slots": 32},
        {},
    ),
}


def recall_batch(rows: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, `(rows, length)`: only the values that are asked for are labels."""
    ids = torch.randint(FIRST_FILLER, FIRST_FILLER + NUM_FILLERS, (rows, length), generator=generator)
    keys = torch.rand(rows, NUM_KEYS, generator=generator).topk(NUM_PAIRS).indices
    values = torch.randint(0, NUM_VALUES, (rows, NUM_PAIRS), generator=generator)
    order = torch.rand(rows, NUM_PAIRS, generator=generator).argsort(1)
    labels = torch.full_like(ids, -100)
    places = torch.arange(NUM_PAIRS) * (ENDS // NUM_PAIRS)
    ids[:, places] = keys * NUM_VALUES + values
    places = places + length - ENDS
    ids[:, places] = FIRST_KEY + keys.gather(1, order)
    ids[:, places + 1] = labels[:, places + 1] = FIRST_VALUE + values.gather(1, order)
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def accuracy(model: InfiniForCausalLM, length: int) -> float:
    """Share of right answers, on the same questions for every model."""
    generator = torch.Generator().manual_seed(length)
    was_training, right = model.training, []
    model.eval()
    # A long row at a time, short ones together.
    rows = max(1, 4096 // length)
    for _ in range(-(-TEST_ANSWERS // (NUM_PAIRS * rows))):
        batch = recall_batch(rows, length, generator)
        logits = model(batch["input_ids"], use_cache=True, logits_to_keep=ENDS).logits[:, :-1]
        labels = batch["labels"][:, -ENDS + 1 :]
        right.append((logits.argmax(-1) == labels)[labels != -100])
    model.train(was_training)
    return torch.cat(right).float().mean().item()


def train(
    fields: dict[str, Any],
    seed: int,
    steps: int,
    learning_rate: float = 4e-3,
    write_sparsity: float = 0.0,
    freeze_gates: bool = False,
    detach_every_num_segments: int | None = None,
) -> tuple[InfiniForCausalLM, dict[int, int]]:
    """The model, and at which step each length was begun."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = InfiniForCausalLM(InfiniConfig(**{**MODEL, **fields})).train()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [
        weight
        for name, weight in model.named_parameters()
        if weight.dim() == 1 and not (freeze_gates and "head_gates" in name)
    ]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=steps)
    stage, begun, running = 0, {TRAINED_LENGTHS[0]: 0}, 0.0
    with sparse_writes(model, write_sparsity) if write_sparsity else nullcontext():
        for step in range(steps):
            length = TRAINED_LENGTHS[stage]
            batch = recall_batch(TOKENS_PER_STEP // length, length, generator)
            loss, _ = backpropagate(model, batch, detach_every_num_segments=detach_every_num_segments)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            # Of the right answers' probability, which needs no second forward.
            running += 0.05 * (torch.exp(-loss.detach()).item() - running)
            if running > MASTERED and stage + 1 < len(TRAINED_LENGTHS):
                stage, running = stage + 1, 0.0
                begun[TRAINED_LENGTHS[stage]] = step + 1
    return model.eval(), begun


def markdown(rows: list[dict[str, Any]]) -> str:
    """
    A line per run: the step at which each seed mastered the first length; the share of right answers by length, its
    mean and each seed's.
    """
    lengths = " | ".join(f"{length:,}" for length in TESTED_LENGTHS)
    lines = [f"| run | first length mastered at step | {lengths} |", "|---" * (2 + len(TESTED_LENGTHS)) + "|"]
    for name in dict.fromkeys(row["run"] for row in rows):
        group = [row for row in rows if row["run"] == name]
        mastered = [str(row["begun"].get(str(TRAINED_LENGTHS[1]), "never")) for row in group]
        cells = [", ".join(mastered)]
        for length in TESTED_LENGTHS:
            found = [row["accuracy"][str(length)] for row in group]
            cells.append(f"{mean(found):.2f} ({', '.join(f'{share:.2f}' for share in found)})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=800, help="(default: %(default)s)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, metavar="RUN", default=list(RUNS), help="(default: all)")
    parser.add_argument("--output", type=Path, help="a file of JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.output and options.output.is_file():
        rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    done = {(row["run"], row["seed"], row["steps"]) for row in rows}
    wanted = [(name, seed) for name in options.runs for seed in options.seeds]
    for name, seed in tqdm([run for run in wanted if (*run, options.steps) not in done], file=sys.stderr):
        fields, how = RUNS[name]
        start = time.perf_counter()
        model, begun = train(fields, seed, options.steps, **how)
        minutes = (time.perf_counter() - start) / 60
        shares = model.local_shares().detach()
        row = {
            "run": name,
            "seed": seed,
            "steps": options.steps,
            "minutes": round(minutes, 2),
            "begun": {str(length): step for length, step in begun.items()},
            "local_share": [round(shares.min().item(), 3), round(shares.max().item(), 3)],
            "accuracy": {str(length): round(accuracy(model, length), 4) for length in TESTED_LENGTHS},
        }
        rows.append(row)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
