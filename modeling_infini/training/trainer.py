"""What the stock `Trainer` lacks for a memory: sequences of any length, streams over steps, gates and their logs."""

import json
import math
import os
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, sort_checkpoints
from transformers.training_args import OptimizerNames

from ..cache import CACHE_NAME, InfiniCache
from ..configuration_infini import copy_whole
from ..streams import has_columns, targets
from .backpropagation import (
    backpropagate,
    has_own_loss,
    infini_module,
    loss_in_chunks,
    prepared_inputs,
    refuse_unread_inputs,
)
from .documents import DocumentStreams, collate_documents, refuse_unread


# In the output folder, what is being written or removed; by its first letter, the Trainer does not publish it.
UNFINISHED = "_unfinished"

# Beside the memory of streams: which streams it has read.
STREAMS_NAME = "streams.json"

# In the output folder, beside the checkpoints: what the run was asked for.
RUN_NAME = "recipe.json"


@dataclass
class InfiniTrainingArguments(TrainingArguments):
    """Every field of [`TrainingArguments`], and those of [`InfiniTrainer`]."""

    chunk_segments: int | None = field(
        default=None,
        metadata={
            "help": "Run a sequence in chunks of this many segments, forward and back, with the activations and "
            "logits of one chunk at a time. The gradients stay exact. Default: the whole sequence at once."
        },
    )
    detach_every_num_segments: int | None = field(
        default=None,
        metadata={
            "help": "End back-propagation at every so many segments, and go back as training goes. Default: through "
            "the whole sequence."
        },
    )
    gate_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the head gates. Default: that of everything else."}
    )
    gate_weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of the head gates; it pulls them to half open."}
    )
    gate_frozen_steps: int = field(
        default=0, metadata={"help": "Hold the head gates where they are for this many steps."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("chunk_segments", "detach_every_num_segments"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        for name in ("gate_learning_rate", "gate_weight_decay"):
            rate = getattr(self, name)
            if rate is not None and not (isinstance(rate, (int, float)) and 0 <= rate < math.inf):
                raise ValueError(f"{name}={rate!r} must be a number from 0 on; YAML reads 5e-3 as a text, 5.0e-3 not.")
        if self.gate_frozen_steps < 0:
            raise ValueError(f"gate_frozen_steps={self.gate_frozen_steps} must not be negative.")


class InfiniTrainer(Trainer):
    """
    A [`Trainer`] for Infini-attention models, with what a memory needs; see [`InfiniTrainingArguments`].

    - Sequences of any length in the memory of one chunk (`chunk_segments`), with exact or truncated gradients
      (`detach_every_num_segments`); evaluation of any length likewise, where only the loss is asked for.
    - [`DocumentStreams`] as datasets: the memory is carried from step to step, and saved in checkpoints.
    - Checkpoints that are whole or not there, whatever stops the run.
    - Gates with their own learning rate, without decay, and frozen at first.
    - A loss of your own over each chunk, with inputs that it alone reads (`loss_inputs`): override `compute_loss`.
      Those of documents that are a number for each token are batched, too.
    - Logs of the gates' local shares, the norms of the memory and tokens/s; NaN or inf in a memory or the loss stops
      training.
    - `eval_loss` is the mean over all tokens, not over batches. (Documents that several processes read twice to fill
      their last batches count twice.) Data without any target have none.

    Documents are batched by [`collate_documents`] unless `data_collator` is given. Columns of numbers that nothing
    reads are refused, where the stock Trainer drops them.
    Other heads than the causal language model's, and anything with DeepSpeed, are trained as by `Trainer`, with the
    gates' options and logs, but norms of the memory are not known and NaN in it is not looked for.
    """

    args: InfiniTrainingArguments
    # transformers' Trainer has it from 5.19 on, and goes by `model_accepts_loss_kwargs` before.
    loss_is_scaled_for_ga: bool | None = None
    # Names of inputs that an overridden `compute_loss` takes out and the model does not read.
    loss_inputs: tuple[str, ...] = ()
    _is_writing_checkpoint = False

    def __init__(
        self, model=None, args: InfiniTrainingArguments | None = None, data_collator=None, *positional, **kwargs
    ):
        if args is None:
            args = InfiniTrainingArguments("tmp_trainer")
        if not isinstance(args, InfiniTrainingArguments):
            raise TypeError(f"InfiniTrainer takes InfiniTrainingArguments, got {type(args).__name__}.")
        super().__init__(model, args, data_collator, *positional, **kwargs)
        if self.loss_is_scaled_for_ga is False:
            self.model_accepts_loss_kwargs = False
        self._has_own_optimizer = self.optimizer is not None
        self._is_causal_lm = self._loss_shifts_labels and hasattr(infini_module(self.model), "lm_head")
        if data_collator is None and self._is_causal_lm:
            self.data_collator = partial(collate_documents, loss_inputs=self.loss_inputs)
        self._memory_of_streams: InfiniCache | None = None
        self._evaluation = _Evaluation(is_stream=False)
        self._state_norms: dict[str, list[float]] = {}
        self._tokens_since_log = 0
        self._logged_at = 0.0
        self._check_arguments()
        self._check_dataset(self.train_dataset, self._train_batch_size)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for dataset in evaluated:
            self._check_dataset(dataset, self.args.eval_batch_size)

    def _check_dataset(self, dataset, batch_size: int) -> None:
        """Whether `dataset` can be read as it is meant to be. Much can be set after the Trainer was made."""
        has_rows = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
        is_list = has_rows and hasattr(dataset, "__len__") and len(dataset) > 0
        if is_list and self._is_causal_lm and self.args.remove_unused_columns and isinstance(dataset[0], Mapping):
            self._refuse_unread(dataset[0])
        in_chunks = self.args.chunk_segments is not None or self.args.detach_every_num_segments is not None
        has_streams = isinstance(dataset, DocumentStreams)
        if not (in_chunks or has_streams):
            return
        if not self._is_causal_lm:
            raise ValueError(
                "Chunks and streams over steps are for causal language models, whose loss is a sum: nothing else "
                "carries a memory from one to the next."
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed counts each backward, of which chunks and streams over steps have several, as a batch. Use "
                "FSDP2 or DDP, or leave out chunk_segments, detach_every_num_segments and DocumentStreams."
            )
        if not self._loss_is_a_sum:
            raise ValueError(
                "compute_loss_func, a loss_function of the model's own, an overridden compute_loss and a loss that is "
                "a mean need the logits of whole sequences, which chunks and streams never make. If your "
                "loss_function or compute_loss is a sum over the tokens that predict shift_labels, divided by "
                "num_items_in_batch, set the Trainer's loss_is_scaled_for_ga=True."
            )
        if not has_streams:
            return
        if self.args.auto_find_batch_size or self.accelerator.split_batches:
            raise ValueError(
                "auto_find_batch_size and split_batches change how many streams a process reads, each of which has a "
                "memory of its own. Turn them off with DocumentStreams."
            )
        if self.args.dataloader_persistent_workers and self.args.dataloader_num_workers > 0:
            raise ValueError(
                "dataloader_persistent_workers keep the order that DocumentStreams had in their first epoch: turn "
                "them off."
            )
        if self.get_tp_size() > 1:
            raise ValueError(
                "DocumentStreams do not go with tensor parallelism: accelerate takes processes that read the same "
                "rows of an iterable dataset for readers of other rows, and ends epochs too early. Use FSDP2 or DDP, "
                "or whole documents."
            )
        rows = self.args.world_size * batch_size
        if dataset.num_streams != rows:
            raise ValueError(
                f"DocumentStreams(num_streams={dataset.num_streams}) do not fit: {self.args.world_size} processes "
                f"with batches of {batch_size} read {rows} streams."
            )

    def _check_arguments(self) -> None:
        if self.args.n_gpu > 1 and self._is_causal_lm:
            raise ValueError(
                f"DataParallel on {self.args.n_gpu} GPUs cannot carry memories. Start a process for each by torchrun "
                "or accelerate launch, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        if self.args.gate_frozen_steps and self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed keeps gradients to itself: gates cannot be frozen by gate_frozen_steps.")
        of_gates = [
            name for name in ("gate_learning_rate", "gate_weight_decay", "gate_frozen_steps") if self._is_set(name)
        ]
        of_groups = [name for name in of_gates if name != "gate_frozen_steps"]
        if of_groups and self._has_own_optimizer:
            raise ValueError(
                f"{' and '.join(of_groups)} are for the optimizer that the Trainer makes; set it in your own."
            )
        if of_gates and not trained_gates(self.model):
            why = "no head gates are trained. With PEFT, put head_gates into modules_to_save"
            if not self._module.config.layers_with_memory:
                why = "no layer of this model has a memory, and so none has gates (memory_layers=[])"
            raise ValueError(f"Nothing can come of {' and '.join(of_gates)}: {why}.")
        optimizer = OptimizerNames(self.args.optim).value
        if "lomo" in optimizer or optimizer.endswith("layerwise"):
            raise ValueError(
                f'optim="{optimizer}" changes weights in the midst of a backward, of which a sequence in '
                "chunks has several, and knows no gates of their own learning rate. Use another one."
            )
        if self.args.use_liger_kernel:
            raise ValueError("use_liger_kernel has no effect: Liger has no kernels for this model.")
        if self.get_cp_size() > 1 or self.get_sp_size() > 1:
            raise ValueError(
                "The context and sequence parallelism of accelerate exchange keys and values and no memory, and are "
                "wrong for this model. Use modeling_infini.training.ContextParallel in a loop of your own."
            )

    def _is_set(self, name: str) -> bool:
        fields = InfiniTrainingArguments.__dataclass_fields__
        return getattr(self.args, name) != fields[name].default

    @property
    def _loss_is_a_sum(self) -> bool:
        """Whether the loss is a sum over tokens divided by `num_items_in_batch`, and so that of chunks adds up."""
        # Who computes a loss of one's own says so by this attribute.
        says_so, is_stock = self.loss_is_scaled_for_ga, not self._overrides_loss and not has_own_loss(self._module)
        return self.compute_loss_func is None and (says_so is True or (is_stock and says_so is None))

    @property
    def _overrides_loss(self) -> bool:
        return getattr(self.compute_loss, "__func__", None) is not InfiniTrainer.compute_loss

    @property
    def _module(self):
        return infini_module(self.model)

    @property
    def _runs_in_chunks(self) -> bool:
        """Whether this class runs the model, be it in one chunk; if not, `Trainer` does."""
        return self._is_causal_lm and self._loss_is_a_sum and not self.is_deepspeed_enabled

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        read: list[str] = self._signature_columns  # type: ignore[attr-defined, assignment]
        self._signature_columns = list(dict.fromkeys([*read, "shift_labels", *self.loss_inputs]))  # type: ignore[assignment]

    def _remove_unused_columns(self, dataset, description=None):
        if self._is_causal_lm and self.args.remove_unused_columns and len(dataset) > 0:
            self._refuse_unread(dataset[0])
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        if not (self._is_causal_lm and self.args.remove_unused_columns):
            return data_collator
        collate = super()._get_collator_with_removed_columns(data_collator, description)

        def collate_what_is_read(features):
            for feature in features:
                if isinstance(feature, Mapping):
                    self._refuse_unread(feature)
            return collate(features)

        return collate_what_is_read

    def _refuse_unread(self, document: Mapping) -> None:
        """What the stock Trainer drops, with a line in its log: masks and weights beside the labels, among others."""
        self._set_signature_columns_if_needed()
        read = [*self._signature_columns, self.args.length_column_name]  # type: ignore[misc]
        refuse_unread(document, read, " A data_collator that reads them needs remove_unused_columns=False.")

    def create_optimizer(self, model=None):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        gates = trained_gates(self.model if model is None else model)
        if is_new and gates:
            of_gates = {id(gate) for gate in gates}
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in of_gates]
            options = {"weight_decay": self.args.gate_weight_decay}
            if self.args.gate_learning_rate is not None:
                options["lr"] = self.args.gate_learning_rate
            optimizer.add_param_group({"params": gates, **options})
        return optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._tokens_since_log += _count_tokens(inputs)
        if not self._runs_in_chunks:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._backpropagate(model, inputs, num_items_in_batch)
        if self.state.global_step < self.args.gate_frozen_steps:
            for gate in trained_gates(model):
                gate.grad = None
        return loss

    def _backpropagate(self, model, inputs, num_items_in_batch):
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        inputs = self._ready(inputs)
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
            num_items_in_batch = num_items_in_batch * self.current_gradient_accumulation_steps
        is_stream = isinstance(self.train_dataset, DocumentStreams)
        if is_stream:
            check_continuity(inputs, self._memory_of_streams)
        scaler = self.accelerator.scaler
        # FSDP reduces the gradients of each chunk: without, each process would hold those of all parameters.
        is_fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        with self.compute_loss_context_manager():
            loss, memory = backpropagate(
                model,
                inputs,
                chunk_segments=self.args.chunk_segments,
                detach_every_num_segments=self.args.detach_every_num_segments,
                past_key_values=self._memory_of_streams if is_stream else None,
                num_items_in_batch=num_items_in_batch,
                compute_loss=partial(self._loss_and_outputs, model, num_items_in_batch),
                loss_inputs=self.loss_inputs,
                backward=self.accelerator.backward,
                loss_scale=1.0 if scaler is None else scaler.get_scale(),
                no_sync=nullcontext if is_fsdp else partial(self.accelerator.no_sync, model=model),
            )
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            clear_device_cache()
        if is_stream:
            self._memory_of_streams = memory
        self._state_norms = state_norms(memory)
        # A gradient scaler leaves out the steps whose gradients are not finite.
        if scaler is None and not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()}: training has diverged, and a step would write it into all weights. Lower "
                "the learning rate, or clip gradients (max_grad_norm)."
            )
        return loss

    def _loss_and_outputs(self, model, num_items_in_batch, inputs):
        return self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)

    def _ready(self, inputs: dict) -> dict:
        """The inputs of a step on this process's device, with `shift_labels`."""
        inputs = prepared_inputs(self._prepare_inputs(inputs))
        if not self._overrides_loss:
            refuse_unread_inputs(self._module, inputs)
        return self._equally_long(inputs)

    def _get_num_items_in_batch(self, batch_samples, device):
        # The stock Trainer counts where there are labels, and divides by 0 where all are masked.
        batches = [self._with_targets(batch) for batch in batch_samples]
        count = super()._get_num_items_in_batch(batches, device)
        return count.clamp(min=1) if torch.is_tensor(count) else count

    def _with_targets(self, batch):
        """With both names of what is learned, and none of it predicted by padding."""
        if "shift_labels" in batch:
            return {"labels": batch["shift_labels"], **batch}
        if self._is_causal_lm and "labels" in batch:
            return {**batch, "shift_labels": targets(batch["labels"], batch.get("attention_mask"))}
        return batch

    def _equally_long(self, inputs: dict) -> dict:
        """Pads to the longest of all processes where these must run equally many chunks: FSDP gathers in each."""
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return inputs
        length = inputs["shift_labels"].shape[1]
        longest = int(self.accelerator.gather(torch.tensor([length], device=self.args.device)).max())
        inputs.setdefault("attention_mask", torch.ones_like(inputs["shift_labels"]))
        padding = {"labels": -100, "shift_labels": -100}
        return {
            name: F.pad(states, (0, 0) * (states.dim() - 2) + (0, longest - length), value=padding.get(name, 0))
            if has_columns(states, inputs["shift_labels"].shape)
            else states
            for name, states in inputs.items()
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.label_smoother is None or "shift_labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: states for name, states in inputs.items() if name != "labels"}
        labels = inputs.pop("shift_labels")
        outputs = model(**inputs)
        loss = self.label_smoother(outputs, labels, num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        dataset = dataloader.dataset
        while isinstance(dataset, IterableDatasetShard):
            dataset = dataset.dataset
        self._check_dataset(dataset, self.args.eval_batch_size)
        self._evaluation = _Evaluation(is_stream=isinstance(dataset, DocumentStreams))
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, targets = self._evaluation.loss, self._evaluation.targets
        if self.args.world_size > 1:
            totals = torch.tensor([loss, targets], dtype=torch.float64, device=self.args.device)
            loss, targets = self.accelerator.reduce(totals, "sum").tolist()
        if targets > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / targets
        elif self._runs_in_chunks:
            # The mean over nothing, which load_best_model_at_end would take for the best.
            output.metrics.pop(f"{metric_key_prefix}_loss", None)
        self._evaluation = _Evaluation(is_stream=False)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        has_labels = inputs.get("labels") is not None or inputs.get("shift_labels") is not None
        if not self._runs_in_chunks or not has_labels:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        evaluation = self._evaluation
        inputs = self._ready(inputs)
        if evaluation.is_stream:
            check_continuity(inputs, evaluation.memory)
        targets = (inputs["shift_labels"] != -100).sum()
        losses, logits, memory = [], [], evaluation.memory if evaluation.is_stream else None
        with self.compute_loss_context_manager():
            for loss, outputs in loss_in_chunks(
                model,
                inputs,
                chunk_segments=self.args.chunk_segments or self.args.detach_every_num_segments,
                past_key_values=memory,
                compute_loss=partial(self._sum_and_outputs, model),
            ):
                losses.append(loss)
                memory = outputs[CACHE_NAME]
                if not prediction_loss_only:
                    logits.append(outputs["logits"])
                del outputs
        total = torch.stack(losses).sum()
        evaluation.memory = memory
        evaluation.loss += total.item()
        evaluation.targets += int(targets)
        mean = total / targets.clamp(min=1)
        if prediction_loss_only:
            return mean, None, None
        return mean, torch.cat(logits, 1), inputs["labels"]

    def _sum_and_outputs(self, model, inputs):
        loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=1)
        # What compute_loss multiplies by, for an average over devices of what was divided by the targets of all.
        world = self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        return loss / world, outputs

    def _memory_folder(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"memory-of-streams-{self.args.process_index}"

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._is_writing_checkpoint else folder

    def _save_checkpoint(self, model, trial):
        """
        A checkpoint gets its name when all processes have written all of it: whatever stops the run, what bears the
        name of one is whole. Only then are older ones removed, and it is published.
        """
        folder = Path(self._get_output_dir(trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_local_process_zero():
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_writing_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            unfinished = Path(self._get_output_dir(trial)) / checkpoint.name
        finally:
            self._is_writing_checkpoint = False
        if self.state.best_model_checkpoint == str(unfinished):
            # Whole, since a run may go on in another working directory.
            self.state.best_model_checkpoint = str(checkpoint.absolute())
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
        if self.args.should_save and self.is_fsdp_enabled and self.processing_class is not None:
            # The stock Trainer writes none beside shards.
            self.processing_class.save_pretrained(unfinished)
        if self._memory_of_streams is not None and isinstance(self.train_dataset, DocumentStreams):
            memory_folder = self._memory_folder(str(unfinished))
            # Made by all the weights that there were on the way here.
            self._memory_of_streams.allow_other_weights = True
            self._memory_of_streams.save_pretrained(memory_folder)
            (memory_folder / STREAMS_NAME).write_text(json.dumps({"fingerprint": self.train_dataset.fingerprint}))
        self.accelerator.wait_for_everyone()
        # One process where all share a disk; one on each machine that has its own.
        for names_it in (self.is_world_process_zero(), self.is_local_process_zero()):
            if names_it and unfinished.is_dir():
                self._remove_checkpoint(checkpoint)
                unfinished.rename(checkpoint)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._remove_older_checkpoints(checkpoint)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _remove_older_checkpoints(self, checkpoint: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        found = [Path(path) for path in sort_checkpoints(str(checkpoint.parent), use_mtime=True)]
        best = self.state.best_model_checkpoint
        # The best one may be of a call that spelled the folder otherwise.
        kept = {path.resolve() for path in (checkpoint, *([] if best is None else [Path(best)]))}
        removable = [path for path in found if path.resolve() not in kept]
        for path in removable[: max(0, len(found) - max(limit, len(kept)))]:
            self._remove_checkpoint(path)

    def _remove_checkpoint(self, checkpoint: Path) -> None:
        """Takes its name away first: a removal that is interrupted leaves no half of a checkpoint."""
        if not checkpoint.is_dir():
            return
        if self.args.push_to_hub and self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            # It may be what is being uploaded.
            self._finish_current_push()
        nameless = checkpoint.parent / UNFINISHED / "removed"
        shutil.rmtree(nameless, ignore_errors=True)
        nameless.parent.mkdir(exist_ok=True)
        checkpoint.rename(nameless)
        shutil.rmtree(nameless, ignore_errors=True)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._is_writing_checkpoint:
            return
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            if self.args.hub_always_push:
                # It reads the files that this push writes.
                self._finish_current_push()
            # Published beside the configuration, which names them.
            for file in Path(checkpoint_folder).glob("*.py"):
                copy_whole(file, Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, trial, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            # What Trainer would remove now, and not at once.
            for checkpoint in map(Path, sort_checkpoints(self._get_output_dir(trial))):
                if not checkpoint.samefile(best):
                    self._remove_checkpoint(checkpoint)
            shutil.rmtree(Path(self._get_output_dir(trial)) / UNFINISHED, ignore_errors=True)
        return super()._finalize_training(trial, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"The optimizer of {checkpoint} was not written by an InfiniTrainer that trains the same parameters. "
                "Resume as it was trained, or load its weights and train anew."
            ) from error
        if checkpoint is not None and isinstance(self.train_dataset, DocumentStreams):
            module = self._module
            folder = self._memory_folder(checkpoint)
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{checkpoint} has no {folder.name}: it was written without DocumentStreams, or by fewer "
                    "processes. Resume as it was trained, or load its weights and train anew."
                )
            streams = folder / STREAMS_NAME
            written = json.loads(streams.read_text())["fingerprint"] if streams.is_file() else None
            if None not in (written, self.train_dataset.fingerprint) and written != self.train_dataset.fingerprint:
                raise ValueError(
                    f"The DocumentStreams of {checkpoint} had other documents, or in another order, so that their "
                    "memory is that of other texts. Resume with the same documents, seed, step_length and num_streams."
                )
            # Made by all the weights that there were on the way to the checkpoint's.
            self._memory_of_streams = type(module.new_cache()).from_pretrained(
                folder, module, self.args.device, allow_other_weights=True
            )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        As [`Trainer.train`]; streams start with an empty memory, or that of the checkpoint. With
        `resume_from_checkpoint=True`, training goes on from the last checkpoint that is whole.
        """
        self._check_arguments()
        self._check_dataset(self.train_dataset, self._train_batch_size)
        self._memory_of_streams = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs, start_time=None):
        if "loss" in logs and start_time is not None and self.is_in_train:
            logs |= self._memory_logs(start_time)
        super().log(logs, start_time)

    def _memory_logs(self, start_time: float) -> dict[str, float]:
        """A summary for every log; what each layer does goes to the trackers that the Trainer reports to."""
        local_shares = self._module.local_shares().detach().float()
        # The other layers have no gates.
        shares = {index: local_shares[index] for index in self._module.config.layers_with_memory}
        layers: dict[str, float] = {}
        summary: dict[str, float] = {}
        for index, share in shares.items():
            layers |= {f"local_share_{name}/layer_{index}": v for name, v in _spread(share).items()}
        if shares:
            summary = {f"local_share_{name}": v for name, v in _spread(torch.stack([*shares.values()])).items()}
        for name, norms in self._state_norms.items():
            # Each process knows those of its own rows.
            norms = self.accelerator.gather(torch.tensor([norms], device=self.args.device)).amax(0).tolist()
            layers |= {f"{name}_norm/layer_{index}": norm for index, norm in enumerate(norms)}
            summary[f"{name}_norm_max"] = max(norms)
        self._report_layers(layers, shares)
        return summary | {"tokens_per_second": self._tokens_per_second(start_time)}

    def _report_layers(self, layers: dict[str, float], shares: dict[int, torch.Tensor]) -> None:
        trackers = tuple(get_reporting_integration_callbacks(self.args.report_to))
        for callback in self.callback_handler.callbacks:
            if not isinstance(callback, trackers):
                continue
            callback.on_log(self.args, self.state, self.control, model=self.model, logs=dict(layers))
            if not self.is_world_process_zero():
                continue
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for index, share in shares.items():
                    callback.tb_writer.add_histogram(f"local_share/layer_{index}", share, self.state.global_step)
            elif isinstance(callback, TrackioCallback):
                import trackio

                histograms = {f"local_share/layer_{i}": trackio.Histogram(s.tolist()) for i, s in shares.items()}
                trackio.log({**histograms, "train/global_step": self.state.global_step})

    def _tokens_per_second(self, start_time: float) -> float:
        now = time.time()
        since = max(start_time, self._logged_at)
        tokens = torch.tensor(float(self._tokens_since_log), device=self.args.device)
        self._logged_at, self._tokens_since_log = now, 0
        # Processes that share heads out count the same tokens.
        return self.accelerator.reduce(tokens, "sum").item() / self.get_tp_size() / (now - since)


@dataclass
class _Evaluation:
    """Of the evaluation that runs: the streams' memory, and the sums that the mean loss of a token is made of."""

    is_stream: bool
    memory: InfiniCache | None = None
    loss: float = 0.0
    targets: int = 0


def check_continuity(inputs: dict, memory: InfiniCache | None) -> None:
    """
    Whether the rows of a step go on where `memory` stopped: other documents, seeds, lengths or numbers of processes
    than those of the checkpoint would be read with the memory of something else.
    """
    if inputs.get("position_ids") is None or inputs.get("attention_mask") is None:
        raise ValueError(
            "Steps of DocumentStreams need their attention_mask and position_ids, by which documents start anew: "
            "leave data_collator out."
        )
    starts = inputs["position_ids"][:, 0]
    read = torch.zeros_like(starts) if memory is None or memory.tokens_read is None else memory.tokens_read
    if len(read) == len(starts):
        breaks = (inputs["attention_mask"][:, 0] != 0) & (starts != 0) & (starts != read)
        if not breaks.any():
            return
    raise ValueError(
        f"The memory of the streams has read {read.tolist()} tokens of their documents, but they go on at "
        f"{starts.tolist()}. Resume with the same documents, seed, step_length, batch size, gradient accumulation and "
        "number of processes."
    )


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The last checkpoint in `folder` that a [`Trainer`] has written to its end, or `None`; [`InfiniTrainer`] leaves no
    other. A stock one that is killed may: its state is what it writes last.
    """
    for checkpoint in reversed(sort_checkpoints(str(folder))):
        if not checkpoint.rpartition("-")[2].isdecimal():
            continue
        try:
            TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return checkpoint
    return None


def record_run(
    folder: str | os.PathLike,
    asked: Mapping[str, Any],
    checkpoint: str | os.PathLike | None = None,
    *,
    places: Collection[str] = (),
) -> None:
    """
    Writes down in `folder` what a run is asked for; one that goes on must be asked for the same.

    Args:
        asked: arguments by their names, of what JSON holds.
        checkpoint: what the run goes on from, in the folder of the run that wrote it; `None`: it starts.
        places: names of arguments that are files, folders or ids of the Hub, or lists of them: where one exists, its
            whole path counts.

    Raises:
        ValueError: if the run that wrote `checkpoint` was asked for something else; the message names the arguments.
    """
    asked = {name: _whole_path(value) if name in places else value for name, value in asked.items()}
    written = None if checkpoint is None else Path(checkpoint).absolute().parent / RUN_NAME
    started = json.loads(written.read_text()) if written is not None and written.exists() else asked
    if changed := [name for name, value in asked.items() if started.get(name) != value]:
        raise ValueError(
            f"The run of {checkpoint} was started with other arguments ({', '.join(changed)}). Repeat that command, "
            "or train into another folder."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    unfinished = Path(folder) / f".{RUN_NAME}"
    unfinished.write_text(json.dumps(asked, indent=2))
    unfinished.replace(Path(folder) / RUN_NAME)


def _whole_path(place: Any) -> Any:
    if isinstance(place, list):
        return [_whole_path(part) for part in place]
    return str(Path(place).resolve()) if place is not None and Path(place).exists() else place


def state_norms(memory: InfiniCache) -> dict[str, list[float]]:
    """
    The largest Frobenius norm of M and of z over the rows and heads, by layer; 0 in layers without memory.

    Raises:
        FloatingPointError: if any of them is NaN or inf; the message names the first such layer.
    """
    nothing = torch.zeros((), device=memory.tokens_read.device)

    def of_layers(norm) -> torch.Tensor:
        return torch.stack([norm(layer) if layer.has_memory else nothing for layer in memory.layers])

    norms = {
        "memory": of_layers(lambda layer: layer.memory.norm(dim=(-2, -1)).amax()),
        "normaliser": of_layers(lambda layer: layer.normaliser.norm(dim=-1).amax()),
    }
    # What the open segments will write counts too: a model that has diverged shows there first.
    pending = of_layers(lambda layer: layer.pending_memory.norm())
    for name, norm in {**norms, "pending memory": pending}.items():
        if not norm.isfinite().all():
            layer = int((~norm.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"The {name} of model.layers.{layer}.self_attn is {norm[layer].item()}: training has diverged, and "
                "further steps would only spread it. Lower the learning rate, or clip gradients (max_grad_norm)."
            )
    return {name: norm.tolist() for name, norm in norms.items()}


def trained_gates(model: nn.Module) -> list[nn.Parameter]:
    """The head gates of a model that are trained; of one wrapped by PEFT, those in `modules_to_save`."""
    return [gate for name, gate in model.named_parameters() if "head_gates." in name and gate.requires_grad]


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "min": values.min().item(), "max": values.max().item()}


def _count_tokens(inputs: dict) -> int:
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs["labels" if "labels" in inputs else "input_ids"].numel()
    return int((mask != 0).sum())


__all__ = ["InfiniTrainer", "InfiniTrainingArguments", "last_whole_checkpoint", "record_run"]
