"""What `examples/train_clm.py` refuses, and that it trains; on several processes it is tested elsewhere."""

import re
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_clm

from modeling_infini import InfiniConfig


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
