"""What `examples/train_clm.py` refuses, and that it trains; on several processes it is tested elsewhere."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_clm
from tiny import EVERY_OPTION, random_ids, tiny_model
from words import random_text, save_word_tokenizer

from infini_transformers.conversion.checkpoints import is_memory_weight
from modeling_infini import InfiniConfig, InfiniForCausalLM
from modeling_infini.training import InfiniTrainer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": 4}, "--lora_rank adapts a checkpoint"),
        ({"lora_targets": "q_proj"}, "set --lora_rank"),
        ({"model": "converted", "vocab_size": 400}, "a checkpoint has its own"),
        ({"config_overrides": "vocab_size=400"}, "set --vocab_size"),
        ({"config_overrides": "segmnt_length=8"}, "no field segmnt_length. Did you mean segment_length?"),
        ({"model": "converted", "config_overrides": "segment_length=8"}, "a checkpoint has its own configuration"),
    ],
)
def test_options_that_have_no_effect_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train_clm.ModelArguments(**fields)


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train_clm.py", *map(str, options), "--use_cpu"])
    train_clm.main()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--do_eval"], "Evaluation needs --eval_files"),
        (["--eval_strategy", "steps"], "Evaluation needs --eval_files"),
        (["--do_predict"], "--do_predict has no effect"),
        (["--resume_from_checkpoint", "last"], "There is no checkpoint in"),
        (["--do_eval", "--eval_files", "a", "--resume_from_checkpoint", "last"], "--do_eval alone evaluates --model"),
        (["--model", "a", "--lora_rank", 2, "--bf16_full_eval"], "rounds the weights that are merged"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, "--train_files", tmp_path, "--output_dir", tmp_path / "out", *options)


def test_trains_from_files_that_are_read_as_training_goes(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    overrides = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=1,segment_length=8,"
    overrides += "memory_norm_init_scale=3.0,memory_write_gate=true,num_key_value_heads=null"
    options = [
        "--vocab_size",
        300,
        "--config_overrides",
        overrides,
        "--streaming",
        "--streams",
        "--sequence_length",
        32,
    ]
    options += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--report_to", "none", "--save_strategy", "no"]
    run(monkeypatch, "--train_files", tmp_path / "book.txt", "--output_dir", tmp_path / "out", *options)
    config = InfiniConfig.from_pretrained(tmp_path / "out")
    assert (config.memory_norm_init_scale, config.memory_write_gate, config.num_key_value_heads) == (3.0, True, 1)


def test_evaluation_while_it_trains_does_not_stand_in_for_training(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("It was the best of times. " * 20)
    trained = []
    monkeypatch.setattr(InfiniTrainer, "train", lambda self, **kwargs: trained.append(self))
    overrides = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=1,segment_length=8"
    options = ["--vocab_size", 300, "--config_overrides", overrides, "--report_to", "none", "--max_steps", 1]
    files = ["--train_files", tmp_path / "book.txt", "--eval_files", tmp_path / "book.txt"]
    run(monkeypatch, *options, *files, "--output_dir", tmp_path / "out", "--eval_strategy", "steps", "--eval_steps", 1)
    assert len(trained) == 1
    run(monkeypatch, *options, *files, "--output_dir", tmp_path / "evaluated", "--do_eval")
    assert len(trained) == 1


SCRATCH = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=1,segment_length=8"
FEW_STEPS = ("--per_device_train_batch_size", 1, "--report_to", "none", "--save_steps", 1, "--max_steps")


def test_a_model_from_scratch_goes_on_with_its_own_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/1.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    options = ["--train_files", tmp_path / "books", "--vocab_size", 280, "--config_overrides", SCRATCH]
    run(monkeypatch, *options, *FEW_STEPS, 1, "--output_dir", tmp_path / "out")
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    (tmp_path / "books/2.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely. " * 60)
    run(monkeypatch, *options, *FEW_STEPS, 2, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "last")
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == vocabulary


def save_converted(folder: Path, seed: int = 0) -> None:
    tiny_model(seed=seed, eos_token_id=1).save_pretrained(folder)
    save_word_tokenizer(folder, eos_token="w1")


def test_a_run_goes_on_as_it_was_started(tmp_path, monkeypatch):
    save_converted(tmp_path / "converted")
    (tmp_path / "book.txt").write_text(random_text(60))
    options = ["--train_files", tmp_path / "book.txt", "--model", tmp_path / "converted", "--lora_rank", 2]
    options += ["--output_dir", tmp_path / "out", *FEW_STEPS]
    run(monkeypatch, *options, 1)
    with pytest.raises(ValueError, match="has checkpoints of a run: add --resume_from_checkpoint last"):
        run(monkeypatch, *options, 2)
    last = ["--resume_from_checkpoint", "last"]
    (tmp_path / "book.jsonl").write_text(json.dumps({"body": random_text(60)}))
    others = ["--train_files", tmp_path / "book.jsonl", "--text_column", "body", "--seed", 7]
    with pytest.raises(ValueError, match=r"other arguments \(train_files, text_column, seed, data_seed\)"):
        run(monkeypatch, *options, 2, *last, *others)
    run(monkeypatch, *options, 2, *last)
    # One of elsewhere goes on in a folder of its own.
    elsewhere = ["--output_dir", tmp_path / "further", "--resume_from_checkpoint", tmp_path / "out/checkpoint-2"]
    run(monkeypatch, *options, 3, *elsewhere)
    with pytest.raises(ValueError, match="further has checkpoints of a run"):
        run(monkeypatch, *options, 3, *elsewhere)
    save_converted(tmp_path / "converted", seed=7)
    with pytest.raises(ValueError, match=r"other arguments \(weights that stand still\)"):
        run(monkeypatch, *options, 3, *last)


def test_what_is_saved_reads_with_a_cache_as_before(tmp_path, monkeypatch):
    save_converted(tmp_path / "converted")
    (tmp_path / "book.txt").write_text(random_text(60))
    files = ["--train_files", tmp_path / "book.txt", "--model", tmp_path / "converted", "--save_strategy", "no"]
    run(monkeypatch, *files, *FEW_STEPS, 1, "--output_dir", tmp_path / "out")
    assert InfiniConfig.from_pretrained(tmp_path / "out").use_cache
    run(monkeypatch, *files, *FEW_STEPS, 1, "--output_dir", tmp_path / "lora", "--lora_rank", 2)
    assert InfiniConfig.from_pretrained(tmp_path / "lora/merged").use_cache


def test_windows_of_a_segment_are_warned_of(tmp_path, monkeypatch):
    save_converted(tmp_path / "converted")
    (tmp_path / "book.txt").write_text(random_text(60))
    files = ["--train_files", tmp_path / "book.txt", "--model", tmp_path / "converted", "--save_strategy", "no"]
    options = [*files, *FEW_STEPS, 1, "--output_dir", tmp_path / "out", "--sequence_length"]
    segment_length = InfiniConfig.from_pretrained(tmp_path / "converted").segment_length
    with pytest.warns(UserWarning, match="nothing is read from the memory"):
        run(monkeypatch, *options, segment_length)
    for more in ([segment_length + 1], [segment_length, "--streams"]):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*nothing is read from the memory")
            run(monkeypatch, *options, *more)


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_a_column_that_is_not_there_is_named_to_a_model_from_scratch(tmp_path, monkeypatch, streaming):
    (tmp_path / "book.jsonl").write_text(json.dumps({"body": "one two"}))
    with pytest.raises(KeyError, match='no column "text" in the documents; there are body'):
        run(monkeypatch, "--train_files", tmp_path / "book.jsonl", "--output_dir", tmp_path / "out", *streaming)


def test_the_order_of_streams_is_that_of_the_seed_of_data(tmp_path, monkeypatch):
    save_converted(tmp_path / "converted")
    (tmp_path / "book.txt").write_text(random_text(60))
    seeds = []
    monkeypatch.setattr(
        InfiniTrainer, "train", lambda self, **kwargs: seeds.append((self.args.seed, self.train_dataset.seed))
    )
    options = ["--train_files", tmp_path / "book.txt", "--model", tmp_path / "converted", *FEW_STEPS, 1]
    options += ["--streams", "--sequence_length", 16, "--output_dir", tmp_path / "out", "--seed", 3]
    run(monkeypatch, *options)
    run(monkeypatch, *options, "--data_seed", 5)
    assert seeds == [(3, 3), (3, 5)]


def test_targets_of_lora_are_found_or_refused_by_name(tmp_path):
    save_converted(tmp_path)
    arguments = train_clm.ModelArguments(str(tmp_path), lora_rank=2, lora_targets="q_proj, self_attn.v_proj")
    model, _ = train_clm.load_model(arguments, [], "text")
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}
    arguments = train_clm.ModelArguments(str(tmp_path), lora_rank=2, lora_targets="q_proj,v_prj,proj,")
    with pytest.raises(ValueError, match="has no module 'v_prj', 'proj', ''"):
        train_clm.load_model(arguments, [], "text")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_every_part_of_the_memory(tmp_path, dtype):
    tiny_model(dtype, **EVERY_OPTION).save_pretrained(tmp_path)
    save_word_tokenizer(tmp_path)
    model, _ = train_clm.load_model(train_clm.ModelArguments(model=str(tmp_path), lora_rank=2), [], "text")
    whole = {name for name, _ in tiny_model(**EVERY_OPTION).named_parameters()}
    # The choice of slots has no gradient.
    of_memory = {name for name in whole if is_memory_weight(name) and "slot_score" not in name}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = [name for name in trained if "modules_to_save" in name]
    assert {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in found} == (
        of_memory
    )
    # Small steps round away in bfloat16; what stands still is as it was.
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == dtype
    ids = random_ids(2, 23)
    model.train()(ids, labels=ids).loss.backward()
    assert {name for name, weight in trained.items() if weight.grad is None} == set()
    assert all(trained[name].grad.any() for name in found)
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(1e-3)
    model.eval()
    expected = model(ids).logits
    merged = model.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == whole
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    merged.save_pretrained(tmp_path / "merged")
    again = InfiniForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name in of_memory:
        assert torch.equal(again.get_parameter(name), merged.get_parameter(name)), name
