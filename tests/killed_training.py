"""
Training that is killed again and again, at random moments, and goes on from what is left: `killed_training.py TRAINER
FOLDER KILLS SEED STRATEGY`. A process of its own, since what it kills are its forks: they need no time to start.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny import random_ids, tiny_model
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from modeling_infini.training import (
    DocumentStreams,
    InfiniTrainer,
    InfiniTrainingArguments,
    collate_documents,
    last_whole_checkpoint,
)


class Tell(TrainerCallback):
    """Writes the step that training goes on from, when the checkpoint is loaded."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_step_begin(self, args, state, control, **kwargs):
        if self.pipe is not None:
            os.write(self.pipe, f"{state.global_step}\n".encode())
            self.pipe = None


def make_trainer(kind: str, folder: Path, strategy: str, max_steps: int, callbacks=()) -> Trainer:
    documents = [{"input_ids": random_ids(30 + 7 * index, seed=index).tolist()} for index in range(6)]
    arguments = InfiniTrainingArguments(
        str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="steps" if strategy else "no",
        save_steps=2,
        save_total_limit=1,
        push_to_hub=strategy not in ("", "none"),
        hub_strategy=strategy if strategy not in ("", "none") else "every_save",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    streams = kind == "InfiniTrainer"
    return (InfiniTrainer if streams else Trainer)(
        tiny_model(attention_dropout=0.1),
        arguments,
        train_dataset=DocumentStreams(documents, 2, 8, seed=1) if streams else documents,
        data_collator=collate_documents,
        callbacks=list(callbacks),
    )


def checkpoint_left(kind: str, folder: Path) -> str | None:
    """What a user would go on from; of a stock Trainer's, the last may be half-written."""
    if not folder.is_dir():
        return None
    return (get_last_checkpoint if kind == "InfiniTrainer" else last_whole_checkpoint)(str(folder))


def train_and_die(kind: str, folder: Path, strategy: str, seconds: float, has_saved: bool) -> int:
    """Kills a run `seconds` after it has begun or gone on; the step that it went on from."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        os.close(reader)
        try:
            checkpoint = checkpoint_left(kind, folder)
            assert checkpoint is not None or not has_saved, "nothing is left to resume from"
            make_trainer(kind, folder, strategy, 10**6, [Tell(writer)]).train(resume_from_checkpoint=checkpoint)
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as told:
        step = told.readline()
    if not step:
        os.waitpid(pid, 0)
        raise SystemExit(f"What was left in {sorted(map(str, folder.rglob('*')))} does not resume.")
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return int(step)


def main(kind: str, folder: str, kills: str, seed: str, strategy: str) -> None:
    draw, run = random.Random(int(seed)), Path(folder) / "run"
    steps: list[int] = []
    # A slow machine gets more time until something is saved.
    while len(steps) < int(kills) or checkpoint_left(kind, run) is None:
        longest = 1.0 if any(steps) else 1.0 + len(steps)
        steps.append(train_and_die(kind, run, strategy, draw.uniform(0.0, longest), any(steps)))
        assert len(steps) < int(kills) + 20, "nothing is ever saved"
        assert steps == sorted(steps), steps
    torch.set_num_threads(1)
    # What all these runs were together is one run that nothing has stopped.
    checkpoint = checkpoint_left(kind, run)
    assert checkpoint is not None
    end = int(checkpoint.rpartition("-")[2]) + 3
    again = make_trainer(kind, run, strategy, end)
    again.train(resume_from_checkpoint=checkpoint)
    whole = make_trainer(kind, Path(folder) / "whole", "", end)
    whole.train()
    for (name, found), expected in zip(again.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(found, expected), name
    print(*steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
