"""
Teaches a converted model to use its memory: distillation from its own base, which reads windows with full attention.

    infini convert path/to/llama converted --segment-length 256 --num-memory-slots 256
    infini transfer converted --texts books/
    python examples/distill.py --model converted --train_files books/ --output_dir distilled

Only the memory's own parameters are trained, so that the base's weights stay byte for byte, and texts of up to one
segment are read as before. Long passages of the texts are read in chunks with exact gradients, and at each token
beyond the first segment the distribution of the next one is to be that of the base, over the whole vocabulary. With
`--recall_share`, a share of the texts hides something and asks for it at the end, where the answer is trained on. They
start short and grow.

Called again, it goes on from the last checkpoint in the output folder: it may be stopped at any moment. In the end,
`distilled/memory` holds what was trained, a few MB:

    infini apply-memory converted distilled/memory

With LoRA, `--lora_rank 16 --lora_layers 20-29`, `distilled/adapter` is the adapter, which belongs to the base with
this memory, and `distilled/merged` the whole model.

The defaults are those of the memory of SmolLM2-135M in `checkpoints/smollm2-memory`: 2.4 million tokens, which took 6
minutes of an H100 that four other processes used as well, with `--bf16 --dtype bfloat16`. With these and
`--tokens_per_step 8192 --chunk_segments 16`, two cores of a CPU that has bfloat16 units (AMX) read 215 tokens a
second, which makes 3 hours for as many, in 12.5 GB. `launch/retrofit.sh` makes one command of the steps above.

Each option of `transformers.TrainingArguments` and of `InfiniTrainingArguments` is one of this script.
"""

import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from infini_transformers.conversion.memory_weights import MemoryWeights, save_memory
from infini_transformers.conversion.shared_base import base_of
from infini_transformers.evaluation.examples import Example
from infini_transformers.evaluation.haystacks import Filler, repeated_sentence
from infini_transformers.evaluation.loading import load_model, load_tokenizer
from infini_transformers.evaluation.retrieval import TASKS
from modeling_infini.training import (
    DistillationTrainer,
    InfiniTrainingArguments,
    last_whole_checkpoint,
    load_documents,
    load_held_out,
    record_run,
    tokenize_documents,
    train_memory_alone,
)
from modeling_infini.training.trainer import RUN_NAME


logger = logging.get_logger(__name__)

TRAINING = {
    # A machine that has nothing else: transformers refuses bfloat16 there, if it is not told.
    "use_cpu": not torch.accelerator.is_available(),
    "max_steps": 147,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "adam_beta2": 0.95,
    "chunk_segments": 4,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "prediction_loss_only": True,
    "train_sampling_strategy": "sequential",
    "logging_steps": 10,
    "save_steps": 20,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass
class RecipeArguments:
    model: str = field(metadata={"help": "A converted checkpoint: a folder or a Hub id."})
    train_files: list[str] = field(metadata={"help": "Texts to read: files or folders, or the id of a dataset."})
    eval_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Others, on which the divergence is measured at --eval_strategy and the end; of a dataset of the "
            "Hub, its split validation."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds a document's text."})
    dtype: str = field(default="auto", metadata={"help": "Of the base's weights; bfloat16 needs --bf16 as well."})
    teacher: str | None = field(
        default=None, metadata={"help": "Another teacher of the same vocabulary. Default: the base of the model."}
    )
    teacher_window: int | None = field(
        default=None, metadata={"help": "Tokens that it sees. Default: its positions, at most 2048."}
    )
    sequence_length: int = field(default=4096, metadata={"help": "Tokens of a passage."})
    tokens_per_step: int = field(default=16384, metadata={"help": "Of all texts of a batch, at least one."})
    recall_share: float = field(default=0.0, metadata={"help": "Of all batches, on texts that end in a question."})
    recall_tasks: list[str] = field(
        default_factory=lambda: ["passkey_trained_wordings", "needle", "mqar", "variable_tracking"],
        metadata={"help": f"Of {', '.join(TASKS)}."},
    )
    recall_lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens of such a text, stage by stage. Default: four segments, doubled up to a passage."},
    )
    recall_weight: float = field(
        default=1.0, metadata={"help": "What the answers of a text count, all together: so much as all its tokens."}
    )
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA adapters beside the memory; 0: none."})
    lora_layers: str | None = field(default=None, metadata={"help": "Which layers they adapt: first-last, from 0 on."})
    check: bool = field(default=False, metadata={"help": "Do not train: refuse what cannot be done, and end."})

    def __post_init__(self):
        if not 0 <= self.recall_share <= 1:
            raise ValueError(f"--recall_share is of all batches: from 0 to 1; got {self.recall_share}.")
        if unknown := set(self.recall_tasks) - set(TASKS):
            raise ValueError(f"--recall_tasks are of {', '.join(TASKS)}; there is no {', '.join(sorted(unknown))}.")
        if bool(self.lora_rank) != (self.lora_layers is not None):
            raise ValueError("--lora_rank and --lora_layers go together, as in --lora_rank 16 --lora_layers 20-29.")
        if self.lora_layers is not None and not self.adapted:
            raise ValueError(f"--lora_layers are first-last, as in 20-29; got {self.lora_layers}.")
        if self.recall_lengths is not None and self.recall_lengths != sorted(self.recall_lengths):
            raise ValueError(f"--recall_lengths grow from stage to stage; got {self.recall_lengths}.")

    @property
    def adapted(self) -> range:
        """The layers that LoRA adapts."""
        layers = re.fullmatch(r"(\d+)-(\d+)", self.lora_layers or "")
        return range(int(layers[1]), int(layers[2]) + 1) if layers else range(0)


class Passages:
    """Passages of documents: longer ones give more of them."""

    def __init__(self, documents, shortest: int, files: Sequence[str] = ()):
        """`documents` of `files` have `input_ids` `(tokens,)`; those of fewer than `shortest` tokens are left out."""
        lengths = np.array([len(document["input_ids"]) for document in documents])
        is_short = lengths < shortest
        if is_short.all():
            raise ValueError(
                f"No text of {', '.join(files)} has {shortest} tokens, two segments: there is nothing to remember."
            )
        if is_short.any():
            logger.warning(
                "%d of %d texts of %s are left out: they have fewer than %d tokens, two segments.",
                is_short.sum(),
                len(lengths),
                ", ".join(files),
                shortest,
            )
        lengths[is_short] = 0
        self.documents, self.shares = documents, lengths / lengths.sum()

    def draw(self, length: int, generator: np.random.Generator) -> torch.Tensor:
        """`(length,)`, or a whole document that is shorter."""
        ids = self.documents[int(generator.choice(len(self.shares), p=self.shares))]["input_ids"]
        start = int(generator.integers(max(1, len(ids) - length + 1)))
        return ids[start : start + length]

    def starts(self, length: int) -> Iterator[torch.Tensor]:
        """The first `length` tokens of each document."""
        return (self.documents[int(index)]["input_ids"][:length] for index in self.shares.nonzero()[0])

    def as_filler(self, length: int, generator: np.random.Generator) -> Filler:
        return Filler("a passage", self.draw(length, generator))


class DistillationTexts(Dataset):
    """
    Batch number i, which depends on i and the seed alone, so that a run goes on anywhere: passages of the texts, or,
    with the probability `recall_share`, such in which something is hidden and asked for.

    Each is a dict of tensors `(rows, tokens)`: `input_ids`; `attention_mask` if texts are of unequal lengths;
    `shift_labels`, -100 in the first segment, where teacher and model agree; `answer_weights`, 0 but for answers.
    """

    def __init__(
        self,
        passages: Passages,
        tokenizer: PreTrainedTokenizerBase,
        segment_length: int,
        recipe: RecipeArguments,
        num_batches: int,
        seed: int,
    ):
        self.passages = passages
        self.tokenizer = tokenizer
        self.segment_length = segment_length
        self.recipe = recipe
        self.num_batches = num_batches
        self.seed = seed
        self.recall_lengths = recipe.recall_lengths or _doubled(4 * segment_length, recipe.sequence_length)
        shortest = min(*self.recall_lengths, recipe.sequence_length)
        if shortest <= segment_length:
            raise ValueError(
                f"Texts of {shortest} tokens fit into one segment of {segment_length}, whose memory nobody reads: "
                "ask for longer ones."
            )
        # What a task needs is known when it is drawn.
        for name in recipe.recall_tasks if recipe.recall_share else ():
            self._draw_example(self.recall_lengths[0], np.random.default_rng(seed), name)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = np.random.default_rng((self.seed, index))
        asks = generator.random() < self.recipe.recall_share
        length = self._draw_recall_length(index, generator) if asks else self.recipe.sequence_length
        rows = max(1, self.recipe.tokens_per_step // length)
        draw = self._draw_question if asks else self._draw_passage
        return padded([draw(length, generator) for _ in range(rows)])

    def _draw_recall_length(self, index: int, generator: np.random.Generator) -> int:
        stage = index * len(self.recall_lengths) // self.num_batches
        shortest, longest = self.recall_lengths[0], self.recall_lengths[stage]
        if generator.random() < 0.6:
            return longest
        return round(math.exp(generator.uniform(math.log(shortest), math.log(longest))))

    def _draw_passage(self, length: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        return self.distilled(self.passages.draw(length, generator))

    def distilled(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The row of a text `(tokens,)` that is read as the teacher reads it."""
        shift_labels = torch.cat([ids[1:], torch.tensor([-100])])
        shift_labels[: self.segment_length] = -100
        return {"input_ids": ids, "shift_labels": shift_labels, "answer_weights": torch.zeros(len(ids))}

    def _draw_question(self, length: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        example = self._draw_example(length, generator)
        row, asked = self.distilled(example.input_ids), example.answer_positions - 1
        others = (row["shift_labels"] != -100).sum() - len(asked)
        row["answer_weights"][asked] = self.recipe.recall_weight * others / len(asked)
        return row

    def _draw_example(self, length: int, generator: np.random.Generator, name: str | None = None) -> Example:
        name = name or self.recipe.recall_tasks[int(generator.integers(len(self.recipe.recall_tasks)))]
        # Of its keys and values, the filler has none: a sentence leaves enough of them.
        if name == "mqar" or generator.random() < 0.25:
            filler = repeated_sentence(self.tokenizer)
        else:
            filler = self.passages.as_filler(length, generator)
        # The start of a text is the hardest place: the most comes after it.
        depth = generator.random() if generator.random() < 0.6 else 0.0
        return TASKS[name].draw(self.tokenizer, filler, length, depth, generator)


def _doubled(shortest: int, longest: int) -> list[int]:
    lengths = [longest]
    while lengths[0] // 2 >= shortest:
        lengths.insert(0, lengths[0] // 2)
    return lengths


def padded(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=padding)
        for name, padding in {"input_ids": 0, "shift_labels": -100, "answer_weights": 0}.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    if len(lengths.unique()) > 1:
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
    return batch


def load_student(recipe: RecipeArguments, arguments: InfiniTrainingArguments):
    """The model on its device, of whose parameters those of the memory are trained; and the teacher."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=recipe.dtype).to(arguments.device)
    if not hasattr(model.config, "segment_length"):
        raise ValueError(f"{recipe.model} is no Infini-attention checkpoint: convert it by `infini convert`.")
    if model.dtype == torch.bfloat16 and not arguments.bf16:
        raise ValueError(
            "The base's weights are bfloat16, and those that are trained float32: add --bf16, by which they work "
            "together, or --dtype float32."
        )
    # What could not be saved in the end is refused now.
    MemoryWeights.of(model)
    # Before adapters wrap what it shares.
    teacher = base_of(model) if recipe.teacher is None else load_model(recipe.teacher, dtype=model.dtype)
    if recipe.lora_rank:
        if recipe.adapted[-1] >= model.config.num_hidden_layers:
            raise ValueError(f"--lora_layers {recipe.lora_layers}: the model has {model.config.num_hidden_layers}.")
        lora = LoraConfig(
            r=recipe.lora_rank,
            lora_alpha=2 * recipe.lora_rank,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            layers_to_transform=list(recipe.adapted),
            layers_pattern="layers",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    train_memory_alone(model, others=["lora_"])
    return model, teacher


def only_batch(batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return batches[0]


def main() -> None:
    parser = HfArgumentParser((RecipeArguments, InfiniTrainingArguments), description=__doc__)
    parser.set_defaults(**TRAINING)
    recipe, arguments = parser.parse_args_into_dataclasses()
    if (arguments.per_device_train_batch_size, arguments.per_device_eval_batch_size) != (1, 1):
        raise ValueError("How many texts a batch has follows from --tokens_per_step: leave batch sizes out.")
    if arguments.bf16_full_eval or arguments.fp16_full_eval:
        raise ValueError("An evaluation in half precision rounds the weights that are saved: leave it out.")
    if arguments.max_steps < 1:
        raise ValueError("Passages are drawn without end: say by --max_steps how many steps to train.")
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(recipe.model)
    model, teacher = load_student(recipe, arguments)
    segment_length = model.config.segment_length

    def passages(files: list[str], load=load_documents) -> Passages:
        with arguments.main_process_first(desc="tokenizing"):
            documents = tokenize_documents(load(files), tokenizer, text_column=recipe.text_column)
        return Passages(documents.with_format("torch"), 2 * segment_length, files)

    num_batches = arguments.max_steps * arguments.gradient_accumulation_steps * arguments.world_size
    texts = DistillationTexts(
        passages(recipe.train_files), tokenizer, segment_length, recipe, num_batches, arguments.seed
    )
    held_out = None
    if recipe.eval_files is not None:
        starts = passages(recipe.eval_files, load_held_out).starts(recipe.sequence_length)
        held_out = [padded([texts.distilled(ids)]) for ids in starts]
    trainer = DistillationTrainer(
        model,
        arguments,
        data_collator=only_batch,
        train_dataset=texts,
        eval_dataset=held_out,
        teacher=teacher,
        teacher_window=recipe.teacher_window,
    )
    if recipe.check:
        return
    checkpoint = arguments.resume_from_checkpoint or last_whole_checkpoint(arguments.output_dir)
    if checkpoint is not None and not (Path(checkpoint).absolute().parent / RUN_NAME).exists():
        logger.warning(
            "%s was written by an earlier version, and goes on with the options of this call. Its defaults were: %s.",
            checkpoint,
            "--max_steps 500 --learning_rate 1e-3 --chunk_segments 8 --sequence_length 8192 --tokens_per_step 8192 "
            "--recall_share 0.2",
        )
    if arguments.should_save:
        # Of the model, a checkpoint knows what has to be the same.
        asked = {name: value for name, value in asdict(recipe).items() if name not in ("model", "eval_files", "check")}
        asked["seed"] = arguments.seed
        record_run(arguments.output_dir, asked, checkpoint, places=["train_files"])
    trainer.train(checkpoint)
    trainer.save_state()
    if held_out is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        save(trainer.accelerator.unwrap_model(model), tokenizer, Path(arguments.output_dir))


def save(model, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What was trained: the memory by itself; with LoRA also the adapter, and the whole model of both."""
    # Of a run that had ended and was called again.
    for name in ("memory", "adapter", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if not isinstance(model, PeftModel):
        save_memory(model, folder / "memory")
        return
    model.save_pretrained(folder / "adapter")
    base = model.unload()
    # Before its base is another. It is saved last: where it is, all else is whole.
    memory = MemoryWeights.of(base)
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    memory.save(
        folder / "memory",
        training="Together with a LoRA adapter, `adapter` beside this folder: neither was trained without the other.",
    )


if __name__ == "__main__":
    main()
