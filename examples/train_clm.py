"""
Trains a causal language model with Infini-attention on whole documents of any length.

Fine-tune a converted checkpoint, with LoRA on the projections and the memory's own weights in full:

    infini convert path/to/llama converted --segment-length 512
    python examples/train_clm.py --model converted --train_files books/ --eval_files held-out.txt \
        --streams --sequence_length 2048 --lora_rank 16 --learning_rate 5e-4 --output_dir tuned

From scratch, with a tokenizer trained on the same files:

    python examples/train_clm.py --train_files books/ --vocab_size 8192 --config_overrides \
        hidden_size=256,intermediate_size=704,num_hidden_layers=4,num_attention_heads=8,num_key_value_heads=4,\
segment_length=128 --streams --sequence_length 2048 --learning_rate 1e-3 --output_dir small

Each option of `transformers.TrainingArguments` and of `InfiniTrainingArguments` is one of this script; on several
processes, run it by `accelerate launch --config_file examples/launch/ddp.yaml examples/train_clm.py ...`.
"""

import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerFast, set_seed

from infini_transformers.conversion.checkpoints import is_memory_weight
from infini_transformers.evaluation.loading import config_fields
from modeling_infini import InfiniConfig, InfiniForCausalLM
from modeling_infini.fingerprint import fingerprint_of_frozen
from modeling_infini.training import (
    DocumentStreams,
    InfiniTrainer,
    InfiniTrainingArguments,
    last_whole_checkpoint,
    load_documents,
    load_held_out,
    record_run,
    tokenize_documents,
)
from modeling_infini.training.documents import require_column


END_OF_TEXT = "<|endoftext|>"


@dataclass
class ModelArguments:
    model: str | None = field(
        default=None, metadata={"help": "An Infini-attention checkpoint: a folder or a Hub id. Default: from scratch."}
    )
    config_overrides: str = field(
        default="", metadata={"help": "Of a model from scratch: field=value,field=value of InfiniConfig."}
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Of the tokenizer of a model from scratch. Default: 8192."}
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA adapters; gates and other weights of the memory are trained in full. 0: train all."
        },
    )
    lora_targets: str | None = field(
        default=None, metadata={"help": "What LoRA adapts. Default: q_proj,k_proj,v_proj,o_proj."}
    )

    def __post_init__(self):
        if self.lora_rank and self.model is None:
            raise ValueError("--lora_rank adapts a checkpoint: name one by --model.")
        if self.lora_targets is not None and not self.lora_rank:
            raise ValueError("--lora_targets says what LoRA adapts: set --lora_rank.")
        if self.config_overrides and self.model is not None:
            raise ValueError(
                "--config_overrides describes a model from scratch; a checkpoint has its own configuration."
            )
        if self.vocab_size is not None and self.model is not None:
            raise ValueError("--vocab_size is for the tokenizer of a model from scratch; a checkpoint has its own.")
        if "vocab_size" in config_fields(self.config_overrides):
            raise ValueError("The model has as many ids as its tokenizer: set --vocab_size.")


@dataclass
class DataArguments:
    train_files: list[str] = field(
        metadata={"help": "Text, JSON-lines or Parquet files, a folder of them, or the id of a dataset of the Hub."}
    )
    eval_files: list[str] | None = field(
        default=None, metadata={"help": "The same, for evaluation; of a dataset of the Hub, its split validation."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds a document's text."})
    streaming: bool = field(default=False, metadata={"help": "Read and tokenize as training goes; set max_steps."})
    streams: bool = field(
        default=False,
        metadata={"help": "Read documents over as many steps as they take, and carry the memory from step to step."},
    )
    sequence_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a step with streams; without, chop documents to it (default: whole documents)."},
    )

    def __post_init__(self):
        if self.streams and self.sequence_length is None:
            raise ValueError("--streams needs --sequence_length, the number of tokens of each document in a step.")


def train_tokenizer(documents, text_column: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained on `documents`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document[text_column] for document in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def load_model(arguments: ModelArguments, documents, text_column: str, checkpoint: str | None = None):
    """The model and its tokenizer: of a run from scratch that goes on, that of its `checkpoint`."""
    if arguments.model is None:
        if checkpoint is None or not (Path(checkpoint) / "tokenizer_config.json").exists():
            tokenizer = train_tokenizer(documents, text_column, arguments.vocab_size or 8192)
        else:
            # Trained anew on texts that have changed since, its ids would mean other words to the weights.
            tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        special = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config = InfiniConfig(**{**special, **config_fields(arguments.config_overrides)})
        return InfiniForCausalLM(config), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    # Weights that are trained are float32: small steps would round away in bfloat16. Those under LoRA stand still.
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype="auto" if arguments.lora_rank else torch.float32
    )
    return with_lora(model, arguments) if arguments.lora_rank else model, tokenizer


def with_lora(model, arguments: ModelArguments) -> PeftModel:
    targets = [target.strip() for target in (arguments.lora_targets or "q_proj,k_proj,v_proj,o_proj").split(",")]
    names = [f".{name}" for name, _ in model.named_modules() if name]
    # PEFT passes over those that no module has, if others are some.
    if unknown := [target for target in targets if not any(name.endswith(f".{target}") for name in names)]:
        raise ValueError(f"--lora_targets: the model has no module {', '.join(map(repr, unknown))}.")
    # The choice of slots has no gradient, and their scores would only decay.
    of_memory = {name.split(".")[-2] for name, _ in model.named_parameters() if is_memory_weight(name)}
    of_memory.discard("slot_score")
    lora = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        target_modules=targets,
        modules_to_save=sorted(of_memory),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    # The memory's own weights among them.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def checkpoint_to_resume(arguments: InfiniTrainingArguments) -> str | None:
    """The checkpoint that training goes on from. A run that starts needs a folder without another one's."""
    checkpoint, last = arguments.resume_from_checkpoint, last_whole_checkpoint(arguments.output_dir)
    if checkpoint == "last":
        if last is None:
            raise ValueError(f"There is no checkpoint in {arguments.output_dir} to resume from.")
        return last
    is_own = checkpoint is not None and Path(checkpoint).resolve().parent == Path(arguments.output_dir).resolve()
    if last is not None and not is_own:
        raise ValueError(
            f"{arguments.output_dir} has checkpoints of a run: add --resume_from_checkpoint last to go on with it, or "
            "take another folder."
        )
    return checkpoint


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, InfiniTrainingArguments), description=__doc__)
    model_arguments, data_arguments, arguments = parser.parse_args_into_dataclasses()
    if (arguments.do_eval or arguments.eval_strategy != "no") and data_arguments.eval_files is None:
        raise ValueError("Evaluation needs --eval_files.")
    if arguments.do_predict:
        raise ValueError("--do_predict has no effect: this script trains and evaluates.")
    if model_arguments.lora_rank and (arguments.bf16_full_eval or arguments.fp16_full_eval):
        raise ValueError("An evaluation in half precision rounds the weights that are merged: leave it out.")
    # To evaluate while it trains sets do_eval as well.
    only_evaluates = arguments.do_eval and not arguments.do_train and arguments.eval_strategy == "no"
    if only_evaluates and arguments.resume_from_checkpoint is not None:
        raise ValueError("--do_eval alone evaluates --model: name the checkpoint there, and resume none.")
    checkpoint = None if only_evaluates else checkpoint_to_resume(arguments)
    set_seed(arguments.seed)

    texts = load_documents(data_arguments.train_files, streaming=data_arguments.streaming)
    require_column(texts, data_arguments.text_column)
    model, tokenizer = load_model(model_arguments, texts, data_arguments.text_column, checkpoint)
    window = None if data_arguments.streams else data_arguments.sequence_length
    if window is not None and window <= model.config.segment_length:
        warnings.warn(
            f"--sequence_length {window} is no more than a segment of {model.config.segment_length} tokens, so that "
            "nothing is read from the memory, nor learned of it: make it longer, or add --streams.",
            stacklevel=1,
        )

    def prepare(documents, batch_size: int, seed: int | None):
        with arguments.main_process_first(desc="tokenizing"):
            documents = tokenize_documents(
                documents, tokenizer, text_column=data_arguments.text_column, window_length=window
            )
        if not data_arguments.streams:
            return documents
        return DocumentStreams(documents, batch_size * arguments.world_size, data_arguments.sequence_length, seed)

    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    # What is read as training goes is read in its own order.
    train_dataset = prepare(texts, arguments.train_batch_size, None if data_arguments.streaming else seed)
    eval_dataset = None
    if data_arguments.eval_files is not None:
        eval_dataset = prepare(load_held_out(data_arguments.eval_files), arguments.eval_batch_size, None)

    use_cache = model.config.use_cache
    trainer = InfiniTrainer(
        model,
        arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    if only_evaluates:
        trainer.log_metrics("eval", trainer.evaluate())
        return
    if arguments.should_save:
        asked = {**asdict(model_arguments), **asdict(data_arguments), "seed": arguments.seed, "data_seed": seed}
        # What is evaluated on may change.
        del asked["eval_files"]
        asked["weights that stand still"] = fingerprint_of_frozen(model)
        record_run(arguments.output_dir, asked, checkpoint, places=["model", "train_files"])
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_fsdp_enabled:  # Checkpoints may be sharded, the model that comes out is whole.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    # The Trainer has turned it off.
    model.config.use_cache = use_cache
    trainer.save_model()
    trainer.save_state()
    if eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if isinstance(model, PeftModel) and trainer.is_world_process_zero():
        if trainer.is_fsdp_enabled:  # Merging would need the shards of all processes.
            print(f"The adapters are in {arguments.output_dir}: load them in one process to merge them.")
            return
        merged = Path(arguments.output_dir) / "merged"
        model.merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)


if __name__ == "__main__":
    main()
