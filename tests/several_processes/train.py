"""
Training runs in which several processes must do what one does. As a script, on each process of a launcher, it runs
some of them: `train.py FOLDER CASE ...`; in the process of a test, `run(case, folder)` runs one.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from several_processes.cpu_as_accelerator import use_cpu_as_accelerator
from tiny import EVERY_OPTION, VOCABULARY, random_ids, tiny_model
from transformers import PreTrainedModel, Trainer

from modeling_infini.training import DocumentStreams, InfiniTrainer, InfiniTrainingArguments, collate_documents


BATCH_SIZE = 4
RESUMED_AT = 3

# In batches of two, as each of two processes gets them: short ones with long ones, and a batch within one segment.
LENGTHS = [3, 4, 38, 12, 21, 9, 2, 5, 1, 1, 17, 30, 11, 26, 5, 40, 6, 8, 33, 7, 4, 2, 3, 23]


@dataclass
class Case:
    """A run: the class of trainer, what differs from the arguments in `train`, and the model's configuration."""

    trainer: type[Trainer] = InfiniTrainer
    arguments: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    streams: bool = False
    resumes: bool = False


EVEN_VOCABULARY = VOCABULARY + 1

SINKS = {"local_attention": "sliding", "num_sink_tokens": 2, "use_mem_delta_rule": True}
CASES = {
    "whole": Case(),
    "stock": Case(trainer=Trainer, arguments={"train_sampling_strategy": "random"}),
    "chunks": Case(arguments={"chunk_segments": 1}, config=EVERY_OPTION),
    "accumulated": Case(
        arguments={"chunk_segments": 2, "gradient_accumulation_steps": 2, "max_steps": 3}, config=EVERY_OPTION
    ),
    "truncated": Case(arguments={"chunk_segments": 1, "detach_every_num_segments": 2}, config=SINKS),
    # DDP does not look for parameters without a gradient then.
    "checkpointed": Case(
        arguments={"chunk_segments": 2, "gradient_checkpointing": True}, config={"learned_delta_update": True}
    ),
    "stock checkpointed": Case(trainer=Trainer, arguments={"gradient_checkpointing": True}, config=EVERY_OPTION),
    "streams": Case(
        arguments={"chunk_segments": 1, "max_steps": 6, "save_steps": RESUMED_AT, "eval_steps": 2},
        streams=True,
        resumes=True,
    ),
    "resumed": Case(
        arguments={"chunk_segments": 2, "max_steps": 5, "save_steps": RESUMED_AT}, config=SINKS, resumes=True
    ),
}


def case_model(case: Case) -> PreTrainedModel:
    # The processes of tensor parallelism share out the vocabulary.
    return tiny_model(torch.float64, vocab_size=EVEN_VOCABULARY, **case.config)


def documents(lengths, seed: int) -> list[dict]:
    return [{"input_ids": random_ids(length, seed=seed + i).tolist()} for i, length in enumerate(lengths)]


def trainer(case: Case, folder: Path, model: PreTrainedModel | None = None) -> Trainer:
    if model is None:
        model = case_model(case)
    # Processes that share heads out read the same rows.
    per_device = BATCH_SIZE * (model.tp_size or 1) // int(os.environ.get("WORLD_SIZE", 1))
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": per_device,
        "per_device_eval_batch_size": per_device,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.03,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps" if "eval_steps" in case.arguments else "no",
        "save_strategy": "steps" if case.resumes else "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    data, held_out = documents(LENGTHS, seed=0), documents([13, 4, 30, 18, 22], seed=100)
    if case.streams:
        data, held_out = DocumentStreams(data, BATCH_SIZE, 13, seed=0), DocumentStreams(held_out, BATCH_SIZE, 8)
    return case.trainer(
        model,
        InfiniTrainingArguments(str(folder), **{**defaults, **case.arguments}),
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=None if case.streams else collate_documents,
    )


def run(case: Case, folder: Path, model: PreTrainedModel | None = None) -> dict[str, list[float]]:
    """
    Trains `model`, or a tiny one, and once more from a checkpoint if the case resumes; the model goes to
    `folder / "model"`, whole.
    """
    first = trainer(case, folder, model)
    first.train()
    results = logged(first)
    if case.resumes:
        again = trainer(case, folder)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{RESUMED_AT}"))
        results |= {f"{name} resumed": values for name, values in logged(again).items()}
    if first.is_fsdp_enabled:
        first.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    first.save_model(str(folder / "model"))
    return results


def logged(trainer: Trainer) -> dict[str, list[float]]:
    names = ("loss", "grad_norm", "eval_loss", "local_share_mean", "local_share_max", "memory_norm_max")
    history = trainer.state.log_history
    return {name: [logs[name] for logs in history if name in logs] for name in names}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        use_cpu_as_accelerator()
    for name in names:
        case_folder = Path(folder) / name
        results = run(CASES[name], case_folder)
        if os.environ["RANK"] == "0":
            (case_folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
