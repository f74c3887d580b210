"""Tiny models under stock Trainers, and what a step of training should do, by hand: each row alone."""

import torch
from tiny import random_ids
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments


# Several segments, less than one, one token more than two, ...; as many tokens count as labels are not -100.
LENGTHS = (17, 4, 11, 8)

# One step of plain gradient descent: the weights after it are those before it, less the gradients.
ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "per_device_train_batch_size": len(LENGTHS),
}


def text_rows(lengths=LENGTHS, seed: int = 0) -> list[dict]:
    rows = []
    for index, length in enumerate(lengths):
        ids = random_ids(length, seed=100 * seed + index).tolist()
        prompt = index % 3 * 2
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    def pad(lists, value):
        return pad_sequence([torch.tensor(values) for values in lists], batch_first=True, padding_value=value)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], -100),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def cpu_arguments(folder, **arguments) -> dict:
    """Of a Trainer that writes to `folder` and reports nowhere."""
    defaults = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    return {**defaults, "disable_tqdm": True, **arguments}


def stock_trainer(model, rows, folder, data_collator=collate, **arguments) -> Trainer:
    return Trainer(
        model,
        TrainingArguments(**cpu_arguments(folder, **arguments)),
        data_collator=data_collator,
        train_dataset=rows,
        eval_dataset=rows,
    )


def loss_by_hand(model, rows, smoothing: float = 0.0) -> torch.Tensor:
    """Mean over all tokens that count, smoothed towards the uniform distribution; each row is read alone."""
    total, count = 0.0, 0
    for row in rows:
        ids, targets = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        log_probs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)[targets != -100]
        losses = -log_probs.gather(1, targets[targets != -100].unsqueeze(1)).squeeze(1)
        total = total + ((1 - smoothing) * losses - smoothing * log_probs.mean(-1)).sum()
        count += len(losses)
    return total / count


def weights_after_a_step_by_hand(model, rows, smoothing: float = 0.0) -> dict[str, torch.Tensor]:
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(loss_by_hand(model, rows, smoothing), list(parameters.values()))
    return {name: (weight - gradient).detach() for (name, weight), gradient in zip(parameters.items(), gradients)}


def assert_weights(model, expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    found = {name: weight.detach() for name, weight in model.named_parameters() if name in expected}
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
