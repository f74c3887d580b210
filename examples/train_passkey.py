"""
Trains a small model from scratch, tokenizer included, to find a passkey in texts far longer than those it trains on;
or goes on with a converted checkpoint.

    python examples/train_passkey.py --train_files austen/ shakespeare/ sotu/ --output_dir passkey-model
    infini evaluate retrieval passkey-model --lengths 131072 1048576 --fillers sentence moby_dick.txt

docs/lab_notebook.md has the phases that made checkpoints/passkey.

What the filler is, how the number is announced and asked for and what other numbers there are varies, and only the
answer is trained on: the space before it, the digits, and the end of the text. Texts grow from 80 to 32,768 tokens as
the model masters them; after that six in ten are of the greatest length, the others of any. Where the number stands is
never told to the model or the loss: what teaches it to write little is the pressure of `sparse_writes`, which looks at
no label.

Over questions alone a converted checkpoint forgets its language; `--language_share 0.6` mixes passages of texts in.

Each option of `transformers.TrainingArguments` and `InfiniTrainingArguments` is one of this script.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import IterableDataset
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from infini_transformers.evaluation.haystacks import REPEATED_SENTENCE, Filler, encode, repeated_sentence, text_filler
from infini_transformers.evaluation.loading import config_fields, load_tokenizer
from infini_transformers.evaluation.passkey import DECOYS, passkey_example
from infini_transformers.evaluation.wordings import TRAINING_WORDINGS, borrow_wording, draw_wording
from modeling_infini import InfiniConfig, InfiniForCausalLM
from modeling_infini.training import InfiniTrainer, InfiniTrainingArguments, load_documents, sparse_writes


END_OF_TEXT = "<|endoftext|>"
# So often are the prompts in what the tokenizer is trained on: their words are tokens, as those of the texts are.
PROMPTS_IN_VOCABULARY = 300
# Texts shorter than this have no opening words and no other numbers.
SHORT = 256
# Of the grammar's texts, in words that stand in the filler.
BORROWED_SHARE = 0.5
# Tokens of a text in a wording of the grammar: the longest have about 120, of a tokenizer of 1024.
SHORTEST_OF_GRAMMAR = 128
# Tokens of the texts from which these words are.
WORDS_FROM = 200_000
# A stage is mastered by the mean loss of so many logs in a row.
LOGS_OF_MASTERY = 3
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "segment_length": 64,
    "local_attention": "sliding",
    "memory_norm_init_scale": 3.0,
    "memory_write_gate": True,
    "memory_eps": 1e-12,
}
TRAINING = {
    "max_steps": 1400,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "adam_beta2": 0.95,
    "per_device_train_batch_size": 1,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass
class RecipeArguments:
    train_files: list[str] = field(metadata={"help": "Texts for the filler and the tokenizer: files or folders."})
    model: str | None = field(
        default=None, metadata={"help": "An Infini-attention checkpoint: a folder or a Hub id. Default: from scratch."}
    )
    config_overrides: str = field(
        default="", metadata={"help": "field=value,field=value of InfiniConfig, for example memory_write_gate=true."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Of the tokenizer of a model from scratch. Default: 1024."}
    )
    lengths: list[int] = field(
        default_factory=lambda: [80, 128, 512, 2048, 8192, 32768],
        metadata={"help": "Tokens of a text, stage by stage."},
    )
    tokens_per_step: int = field(default=8192, metadata={"help": "Of all texts of a step, at least one."})
    mastery: float = field(
        default=0.15, metadata={"help": "The next stage starts when the loss of three logs in a row is less."}
    )
    rate_decay: float = field(default=0.85, metadata={"help": "Of the learning rate, from stage to stage."})
    release_stage: int = field(
        default=3,
        metadata={"help": "From this stage on gates are trained, and `write_sparsity` and `near_decoys` take effect."},
    )
    near_decoys: float = field(
        default=0.0, metadata={"help": "The probability of other numbers to stand close to the one in question."}
    )
    stray_numbers: float = field(
        default=0.0, metadata={"help": "The share of the filler's words that are replaced by numbers of any kind."}
    )
    grammar_share: float = field(
        default=0.0, metadata={"help": "Of all texts, in wordings of the grammar; the others in six fixed ones."}
    )
    write_sparsity: float = field(default=0.003, metadata={"help": "Weight of the penalty on writes; 0: none."})
    language_share: float = field(
        default=0.0,
        metadata={"help": "Of all steps, on passages of the texts, every token a label."},
    )

    def __post_init__(self):
        if self.vocab_size is not None and self.model is not None:
            raise ValueError("--vocab_size is for the tokenizer of a model from scratch; a checkpoint has its own.")
        if "vocab_size" in config_fields(self.config_overrides):
            raise ValueError("The model has as many ids as its tokenizer: set --vocab_size.")
        last_stage = len(self.lengths) - 1
        if not 0 <= self.release_stage <= last_stage:
            raise ValueError(
                f"--release_stage {self.release_stage} is none of the stages of --lengths, 0 to {last_stage}, so that "
                "gates would never be trained, nor writes pressed on."
            )
        if self.grammar_share > 0 and min(self.lengths) < SHORTEST_OF_GRAMMAR:
            raise ValueError(
                f"Texts of {min(self.lengths)} tokens are too short for some wordings of --grammar_share: start "
                f"--lengths at {SHORTEST_OF_GRAMMAR}."
            )


class Curriculum(TrainerCallback):
    """Goes on to longer texts when the present ones are mastered, and holds the head gates still at first."""

    def __init__(self, model: InfiniForCausalLM, arguments: RecipeArguments):
        if arguments.write_sparsity > 0 and not model.config.memory_write_gate:
            raise ValueError("A model without write gates has none to press on: --write_sparsity 0, or add them.")
        if not 0 <= arguments.language_share < 1:
            raise ValueError(f"--language_share is of all steps: 0 or more, below 1; got {arguments.language_share}.")
        self.model = model
        self.arguments = arguments
        self.segment_length = model.config.segment_length
        self.losses: deque[float] = deque(maxlen=LOGS_OF_MASTERY)
        self.penalty = ExitStack()
        self.stage = 0

    @property
    def length(self) -> int:
        """Number of tokens of the longest texts."""
        return self.arguments.lengths[self.stage]

    @property
    def is_released(self) -> bool:
        """Whether the task is mastered so far that gates are trained, writes pressed on and decoys moved near."""
        return self.stage >= self.arguments.release_stage

    @contextmanager
    def segments_of_questions(self) -> Iterator[None]:
        """The model's segments are short for short texts: only then has one an end between number and question."""
        self.model.config.segment_length = min(self.segment_length, max(32, self.length // 4))
        try:
            yield
        finally:
            self.model.config.segment_length = self.segment_length

    def _enter(self, stage: int) -> None:
        self.stage = stage
        self.losses.clear()
        if stage == self.arguments.release_stage and self.arguments.write_sparsity > 0:
            self.penalty.enter_context(sparse_writes(self.model, self.arguments.write_sparsity))
        for name, parameter in self.model.named_parameters():
            if "head_gates" in name:
                parameter.requires_grad_(self.is_released)

    def on_train_begin(self, args, state, control, **kwargs):
        # Not before: an optimizer made now would leave out what is held still.
        self._enter(0)

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        decay = self.arguments.rate_decay**self.stage
        lr_scheduler.base_lrs = [group["initial_lr"] * decay for group in optimizer.param_groups]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "question_loss" not in (logs or {}):
            return
        self.losses.append(logs["question_loss"])
        has_mastered = len(self.losses) == LOGS_OF_MASTERY and np.mean(self.losses) < self.arguments.mastery
        if has_mastered and self.stage + 1 < len(self.arguments.lengths):
            self._enter(self.stage + 1)
            print(f"step {state.global_step}: on to {self.length:,} tokens", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.penalty.close()


class RecipeTrainer(InfiniTrainer):
    """Reads questions in the segments of their stage, and logs their loss, by which the curriculum goes."""

    def __init__(self, *args, curriculum: Curriculum, **kwargs):
        super().__init__(*args, callbacks=[curriculum], **kwargs)
        self.curriculum = curriculum
        self._question_losses: list[float] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not (inputs["labels"] == -100).any():
            return super().training_step(model, inputs, num_items_in_batch)
        with self.curriculum.segments_of_questions():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._question_losses.append(loss.item())
        return loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self._question_losses:
            logs["question_loss"] = float(np.mean(self._question_losses))
            self._question_losses.clear()
        super().log(logs, start_time)


class PasskeyTexts(IterableDataset):
    """
    Batches of texts that end in a question and its answer, the only part with labels; and among them, with the
    probability `language_share`, passages of `language` with labels everywhere.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        fillers: Sequence[Filler],
        language: Filler,
        curriculum: Curriculum,
        seed: int,
    ):
        self.tokenizer = tokenizer
        self.fillers = fillers
        self.language = language
        self.words = str(tokenizer.decode(language.ids[:WORDS_FROM])).split()
        self.curriculum = curriculum
        self.generator = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        share = self.curriculum.arguments.language_share
        while True:
            if share > 0 and self.generator.random() < share:
                yield self._draw_passage(self.curriculum.arguments.tokens_per_step)
                continue
            length = self._draw_length()
            rows = max(1, self.curriculum.arguments.tokens_per_step // length)
            texts = [self._draw_text(length) for _ in range(rows)]
            yield {name: torch.stack([text[name] for text in texts]) for name in ("input_ids", "labels")}

    def _draw_length(self) -> int:
        shortest, longest = self.curriculum.arguments.lengths[0], self.curriculum.length
        if self.generator.random() < 0.6:
            return longest
        return round(math.exp(self.generator.uniform(math.log(shortest), math.log(longest))))

    def _draw_passage(self, length: int) -> dict[str, torch.Tensor]:
        ids = self.language.passage(int(self.generator.integers(len(self.language.ids))), length).unsqueeze(0)
        return {"input_ids": ids, "labels": ids}

    def _draw_text(self, length: int) -> dict[str, torch.Tensor]:
        draw = self.generator
        if draw.random() < self.curriculum.arguments.grammar_share:
            borrows = draw.random() < BORROWED_SHARE
            wording = borrow_wording(self.words, draw) if borrows else draw_wording(draw)
        else:
            wording = TRAINING_WORDINGS[draw.integers(len(TRAINING_WORDINGS))]
        decoys = 0
        if length < SHORT:
            wording = wording._replace(opening="")
        else:
            decoys = int(draw.integers(1 + min(8, length // SHORT)))
        filler = self.fillers[0 if draw.random() < 0.25 else draw.integers(1, len(self.fillers))]
        near = self.curriculum.arguments.near_decoys if self.curriculum.is_released else 0.0
        # The start of the text is the hardest place: the most comes after it.
        depth = draw.random() if draw.random() < 0.6 else 0.0
        example = passkey_example(self.tokenizer, filler, length - 1, depth, draw, wording, decoys, near)
        ids = torch.cat([example.input_ids, torch.tensor([self.tokenizer.eos_token_id])])
        labels = torch.full_like(ids, -100)
        # The space, the digits and the end: what follows the prompt as a user writes it.
        start = len(example.input_ids) - len(encode(self.tokenizer, wording.answer(example.facts["answer"])))
        labels[start:] = ids[start:]
        return {"input_ids": ids, "labels": labels}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of single digits, trained on the filler and on what numbers are announced in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    wordings = [" ".join((wording.opening, wording.needle, wording.question)) for wording in TRAINING_WORDINGS]
    prompts = " ".join([REPEATED_SENTENCE, *wordings, *DECOYS])
    tokenizer.train_from_iterator([*texts, *[prompts] * PROMPTS_IN_VOCABULARY], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def with_stray_numbers(text: str, share: float, generator: np.random.Generator) -> str:
    """
    A text in which so many of the words are numbers of one to four digits instead, as `12`, `12th` or `12,000`. Those
    of five are told from the one in question by their sentences ([`DECOYS`]) alone.
    """
    words = text.split()
    for place in np.flatnonzero(generator.random(len(words)) < share):
        number = generator.integers(10 ** generator.integers(1, 5))
        words[place] = f"{number}{generator.choice(['', 'th', ',000', '.'])}"
    return " ".join(words)


def make_model(tokenizer: PreTrainedTokenizerBase, recipe: RecipeArguments) -> InfiniForCausalLM:
    overrides = config_fields(recipe.config_overrides)
    if recipe.model is not None:
        # Float32, whatever it is saved in: small steps would round away in bfloat16.
        return InfiniForCausalLM.from_pretrained(recipe.model, dtype=torch.float32, **overrides)
    # No pad token: it is the EOS token, whose embedding is to be learned.
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return InfiniForCausalLM(InfiniConfig(**{**MODEL, **special, "vocab_size": len(tokenizer), **overrides}))


def refuse_options(arguments: InfiniTrainingArguments) -> None:
    """Refuses what the curriculum would not go by."""
    if arguments.resume_from_checkpoint is not None:
        raise ValueError(
            "The curriculum cannot be resumed in its midst: --model CHECKPOINT goes on with the checkpoint's weights, "
            "and --lengths and --max_steps say with what."
        )
    expected = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}
    if others := [f"--{name}" for name, value in expected.items() if getattr(arguments, name) != value]:
        raise ValueError(
            f"Leave out {' and '.join(others)}: batches are drawn one by one, as the model masters them. How much a "
            "step reads is said by --tokens_per_step, and how much of it is run at once by --chunk_segments."
        )
    if arguments.world_size > 1:
        raise ValueError(
            "Each of several processes would draw the same texts: run one, with more --tokens_per_step if need be."
        )


def main() -> None:
    parser = HfArgumentParser((RecipeArguments, InfiniTrainingArguments), description=__doc__)
    parser.set_defaults(**TRAINING)
    recipe, arguments = parser.parse_args_into_dataclasses()
    refuse_options(arguments)
    set_seed(arguments.seed)
    texts = [document["text"] for document in load_documents(recipe.train_files)]
    tokenizer = load_tokenizer(recipe.model) if recipe.model else train_tokenizer(texts, recipe.vocab_size or 1024)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {recipe.model} has no EOS token, in which each answer ends: give it one.")
    text = with_stray_numbers("\n".join(texts), recipe.stray_numbers, np.random.default_rng(arguments.seed))
    fillers = [repeated_sentence(tokenizer), text_filler(tokenizer, "training texts", text)]
    # As the texts are written, and not with single spaces.
    language = Filler("training texts", encode(tokenizer, "\n".join(texts))) if recipe.language_share else fillers[1]
    model = make_model(tokenizer, recipe)
    curriculum = Curriculum(model, recipe)
    print(f"{model.num_parameters():,} parameters, {len(fillers[1].ids):,} tokens of filler", flush=True)
    trainer = RecipeTrainer(
        model,
        arguments,
        data_collator=lambda batches: batches[0],
        train_dataset=PasskeyTexts(tokenizer, fillers, language, curriculum, arguments.seed),
        processing_class=tokenizer,
        curriculum=curriculum,
    )
    trainer.train()
    # Off in training, and what a saved model should do when it is read with.
    model.config.use_cache = True
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
