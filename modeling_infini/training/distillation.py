"""
Distillation: the distribution of the next token is trained to be that of a teacher which sees further.

    loss = (sum over tokens of KL(teacher || student) + sum over answers of weight * -log p(answer)) / targets

The teacher's last hidden states are kept for the whole of a text, and cut into chunks with it; distributions over the
vocabulary exist for a few tokens at a time.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from ..fingerprint import fingerprint_of_frozen
from ..streams import streams_of_call
from .trainer import InfiniTrainer


# In a checkpoint's metadata, the fingerprint of what was not trained.
FROZEN = "frozen"

# Of one kind, in memory at a time: 64 MB in float32.
LOGITS_OF_SLICE = 2**24


@torch.no_grad()
def window_states(teacher: PreTrainedModel, input_ids: torch.Tensor, window: int) -> torch.Tensor:
    """
    Last hidden states of a model that cannot read a text whole: in windows that overlap by a half, of which the second
    half is kept. So each token sees the `window / 2` to `window - 1` tokens before it, or all of them where there are
    fewer.

    Args:
        input_ids: `(B, T)`; padding on the right.
        window: number of tokens in a window, even.

    Returns:
        `(B, T, hidden_size)`
    """
    base: nn.Module = teacher.base_model
    half, length = window // 2, input_ids.shape[1]
    states = [base(input_ids[:, :window], use_cache=False).last_hidden_state]
    for start in range(half, length - half, half):
        states.append(base(input_ids[:, start : start + window], use_cache=False).last_hidden_state[:, half:])
    return torch.cat(states, 1)


def _logits(head: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """At least in float32."""
    logits = head(states.to(next(head.parameters()).dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _DivergenceInSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, head, teacher_states, teacher_head):
        needs_gradient = ctx.needs_input_grad[0]
        total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        gradient = torch.zeros_like(states, dtype=total.dtype)
        length = max(1, LOGITS_OF_SLICE // next(head.parameters()).shape[0])
        for part, of_teacher, of_states in zip(
            states.split(length), teacher_states.split(length), gradient.split(length)
        ):
            expected = _logits(teacher_head, of_teacher).log_softmax(-1)
            with torch.set_grad_enabled(needs_gradient):
                part = part.detach().requires_grad_(needs_gradient)
                logits = _logits(head, part)
            found, probabilities = logits.detach().log_softmax(-1), expected.exp()
            total += expected.sub_(found).mul_(probabilities).sum()
            if needs_gradient:
                # The derivative of the divergence, in fewer passes over the vocabulary than autograd would take.
                of_logits = found.exp_().sub_(probabilities)
                of_states.copy_(torch.autograd.grad(logits, part, of_logits)[0])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, gradient_of_total):
        (gradient,) = ctx.saved_tensors
        return gradient * gradient_of_total, None, None, None


def divergence(
    states: torch.Tensor, head: nn.Module, teacher_states: torch.Tensor, teacher_head: nn.Module
) -> torch.Tensor:
    """
    The sum over tokens of KL(teacher || student) between their distributions of the next token, over the whole
    vocabulary. Logits exist for a slice of the tokens at a time, forward and back; the heads get no gradient.

    Args:
        states: last hidden states of the student, `(tokens, hidden_size)`.
        head: from them to logits; its weights stand still.
        teacher_states, teacher_head: the same of the teacher, which may be of another size.

    Returns:
        `()`, in nats, at least in float32.
    """
    return _DivergenceInSlices.apply(states, head, teacher_states, teacher_head)


def train_memory_alone(model: nn.Module, others: Iterable[str] = ()) -> None:
    """
    Freezes all parameters but those of the memories and their gates, which come to be in float32, at least: small
    steps would round away in bfloat16.

    Args:
        others: what else is trained: parts of parameters' names, such as `lora_`.

    Raises:
        ValueError: if that is nothing.
    """
    for name, parameter in model.named_parameters():
        is_trained = any(part in name for part in (".self_attn.memory.", ".self_attn.head_gates.", *others))
        parameter.requires_grad_(is_trained)
        if is_trained:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The model has no layer with a memory (memory_layers=[]): there is nothing to train.")


def _require_one_text_per_row(inputs: dict) -> None:
    """The teacher reads the ids alone, from left to right."""
    shape = inputs["input_ids"].shape
    is_token, restarts = streams_of_call(inputs.get("attention_mask"), inputs.get("position_ids"), shape, None)
    if restarts is not None and restarts.any():
        raise ValueError(
            "DistillationTrainer takes one document per row, and these rows have several (position_ids that start "
            "again, or documents numbered in attention_mask): the teacher would read across them."
        )
    if is_token is not None and (is_token[:, 1:] & ~is_token[:, :-1]).any():
        raise ValueError("DistillationTrainer takes padding on the right alone: the teacher would read other as text.")


def _require_weights(weights: torch.Tensor, shape: torch.Size) -> None:
    if weights.shape != shape:
        raise ValueError(
            f"answer_weights are of the shape {tuple(weights.shape)}, and input_ids of {tuple(shape)}: each token has "
            "one, as in shift_labels."
        )
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("answer_weights must be finite and not negative: 0 where the teacher is to be followed.")


class DistillationTrainer(InfiniTrainer):
    """
    An [`InfiniTrainer`] that trains towards a teacher's distributions instead of the texts' next tokens.

    Inputs are those of `InfiniTrainer`, of one document per row, and `answer_weights` `(B, T)`, if need be. Of the
    tokens that have a target (in `shift_labels`, or by `labels`), those of weight 0 are to have the teacher's
    distribution, and the others their target, as an answer that the teacher may be too short-sighted to know; their
    losses count so much. The weight of an answer stands, as in `shift_labels`, at the token that predicts it: one
    column to the left of the answer itself.

    Checkpoints hold the parameters that are trained, and no others: the others must be the same when one is resumed.

    Args:
        teacher: a causal language model of the same vocabulary, e.g. [`~conversion.base_of`] the model itself.
        teacher_window: how many tokens the teacher reads at a time; by default its `max_position_embeddings`, but
            2,048 at most.

    Raises:
        ValueError: if the teacher has another vocabulary, or cannot read such windows; if the model's head is trained;
            for options that this loss has not (`label_smoothing_factor`).
    """

    loss_inputs = ("teacher_states", "answer_weights")
    # A sum over the targets, divided by their number in all batches of a step.
    loss_is_scaled_for_ga = True
    # Where nothing but the loss is evaluated, one of each call is enough.
    _evaluates_logits = False

    def __init__(self, *args, teacher: PreTrainedModel, teacher_window: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        module, longest = self._module, teacher.config.max_position_embeddings
        self.teacher = teacher.to(self.args.device).eval()  # type: ignore[arg-type]
        self.teacher_window = min(2048, longest) // 2 * 2 if teacher_window is None else teacher_window
        if teacher.config.vocab_size != module.config.vocab_size:
            raise ValueError(
                f"The teacher has a vocabulary of {teacher.config.vocab_size} tokens, the model of "
                f"{module.config.vocab_size}: they must be of one tokenizer."
            )
        if self.teacher_window % 2 or not 2 <= self.teacher_window <= longest:
            raise ValueError(
                f"teacher_window={self.teacher_window} must be an even number from 2 to the teacher's "
                f"max_position_embeddings={longest}."
            )
        if any(parameter.requires_grad for parameter in module.lm_head.parameters()):
            raise ValueError("The head must stand still: call train_memory_alone(model), or freeze lm_head.")
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: a teacher's distributions are not smoothed. Leave it out.")
        self._frozen = fingerprint_of_frozen(module)
        self._sums: dict[str, list[torch.Tensor]] = {"divergence": [], "answer_loss": []}

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        weights = inputs.get("answer_weights")
        if inputs.get("labels") is None and inputs.get("shift_labels") is None:
            # Of no loss: a prediction.
            return {name: states for name, states in inputs.items() if name != "answer_weights"}
        if weights is not None:
            _require_weights(weights, inputs["input_ids"].shape)
        _require_one_text_per_row(inputs)
        with self.accelerator.autocast():
            states = window_states(self.teacher, inputs["input_ids"], self.teacher_window)
        return {**inputs, "teacher_states": states}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._evaluates_logits = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        inputs.pop("labels", None)
        labels, teacher_states = inputs.pop("shift_labels"), inputs.pop("teacher_states")
        weights = inputs.pop("answer_weights", torch.zeros_like(labels))
        # All hidden states, for the last of them: logits of all tokens are too many, but where metrics ask for them.
        keeps_all = self._evaluates_logits and not model.training
        outputs = model(**inputs, output_hidden_states=True, logits_to_keep=0 if keeps_all else 1)
        states, head = outputs.hidden_states[-1], self._module.lm_head
        is_answer = (labels != -100) & (weights > 0)
        is_distilled = (labels != -100) & (weights == 0)
        with self.accelerator.autocast():
            distilled = divergence(
                states[is_distilled], head, teacher_states[is_distilled], self.teacher.get_output_embeddings()
            )
            of_answers = F.cross_entropy(_logits(head, states[is_answer]), labels[is_answer], reduction="none")
        if model.training:
            self._sums["divergence"].append(torch.stack([distilled.detach(), is_distilled.sum()]))
            self._sums["answer_loss"].append(torch.stack([of_answers.detach().sum(), is_answer.sum()]))
        loss = (distilled + (weights[is_answer] * of_answers).sum()) / num_items_in_batch
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            # Of this process's rows; means of a token and of an answer's token.
            for name, sums in self._sums.items():
                total, count = torch.stack(sums).sum(0).tolist() if sums else (0.0, 0)
                logs |= {name: total / count} if count else {}
                sums.clear()
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        weights = {name: weight.detach().cpu().contiguous() for name, weight in trained.items()}
        # By this name the Trainer loads it into the model again when it resumes.
        save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt", FROZEN: self._frozen})
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        made_with, whole = self._frozen, Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if whole.is_file():
            with safe_open(whole, "pt") as file:
                made_with = (file.metadata() or {}).get(FROZEN, self._frozen)
        if made_with != self._frozen:
            raise ValueError(
                f"{resume_from_checkpoint} was trained with other weights than this model has (another base or dtype, "
                "or slots that were fitted anew): what it holds is worth nothing here. Train into another folder, or "
                "go on with the model that it was trained with."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        # As it was saved; Trainer would look for the files of PEFT.
        weights = load_file(Path(str(self.state.best_model_checkpoint)) / SAFE_WEIGHTS_NAME)
        model = self.accelerator.unwrap_model(self.model)
        self._issue_warnings_after_load(model.load_state_dict(weights, strict=False))

    def _issue_warnings_after_load(self, load_result):
        # What is missing was not trained.
        if load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint has {load_result.unexpected_keys[0]}, which the model has not: resume with the "
                "options that it was trained with, or train into another folder."
            )


__all__ = ["DistillationTrainer", "divergence", "train_memory_alone", "window_states"]
