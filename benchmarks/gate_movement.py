"""
How far the gates' logits move under a stock `Trainer`, with `head_gate_scale` 1 and with its default of 10.

The task needs the memory: one token of the first segment names one of 16 values, all others are filler, and after the
last one the model is asked for the value. The two runs of a pair differ in the scale alone: the same weights at the
start, data, AdamW and learning rate, which is one for all weights and falls linearly to 0. Under two minutes.

    python -m benchmarks.gate_movement
"""

import argparse
import tempfile

import torch
from transformers import Trainer, TrainingArguments

from modeling_infini import InfiniConfig, InfiniForCausalLM


NUM_VALUES, NUM_FILLERS = 16, 16
QUESTION = NUM_VALUES + NUM_FILLERS
SEGMENT_LENGTH, NUM_SEGMENTS = 16, 4
BATCH_SIZE = 32

SETTINGS = [
    {"learning_rate": 5e-5},
    {"learning_rate": 1e-3},
    {"learning_rate": 1e-3, "weight_decay": 0.1},
    {"learning_rate": 1e-3, "initial_logit": 4.0},
]


def recall_rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, SEGMENT_LENGTH * NUM_SEGMENTS)
    ids = torch.randint(NUM_VALUES, QUESTION, shape, generator=generator)
    values = torch.randint(NUM_VALUES, (count,), generator=generator)
    ids[torch.arange(count), torch.randint(SEGMENT_LENGTH, (count,), generator=generator)] = values
    ids[:, -2], ids[:, -1] = QUESTION, values
    labels = torch.full_like(ids, -100)
    labels[:, -1] = values
    return [{"input_ids": row, "labels": targets} for row, targets in zip(ids, labels)]


def train(
    scale: float, steps: int, learning_rate: float, weight_decay: float = 0.0, initial_logit: float = 0.0
) -> tuple[torch.Tensor, float]:
    """By how much each gate's logit moved, `(layers, heads)`, and the share of right answers afterwards."""
    torch.manual_seed(0)
    config = InfiniConfig(
        vocab_size=QUESTION + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        segment_length=SEGMENT_LENGTH,
        head_gate_scale=scale,
        head_gate_init_value=initial_logit,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = InfiniForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            per_device_train_batch_size=BATCH_SIZE,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=recall_rows(BATCH_SIZE * steps, seed=0)).train()
    ids = torch.stack([row["input_ids"] for row in recall_rows(256, seed=1)])
    with torch.no_grad():
        answers = model.eval()(ids, use_cache=False).logits[:, -2].argmax(-1)
        moved = model.local_shares().logit() - initial_logit
    return moved, (answers == ids[:, -1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print("learning rate  decay  start  scale | logits moved: mean     std     max | local share  right answers")
    for setting in SETTINGS:
        for scale in (1.0, 10.0):
            moved, right = train(scale, steps, **setting)
            start = setting.get("initial_logit", 0.0)
            shares = (start + moved).sigmoid()
            print(
                f"{setting['learning_rate']:13g}  {setting.get('weight_decay', 0.0):5g}  {start:5g}  {scale:5g} | "
                f"{moved.abs().mean():18.3f}  {moved.std():6.3f}  {moved.abs().max():6.3f} | "
                f"{shares.min():5.1%}-{shares.max():5.1%}  {right:13.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
