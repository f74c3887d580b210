"""`examples/launch/retrofit.sh`: from a base and texts to a memory, ended by anything at any time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from base_models import base_model
from safetensors.torch import load_file
from words import random_text, save_word_tokenizer

from infini_transformers import cli
from infini_transformers.conversion import __main__ as conversion
from infini_transformers.conversion import convert_to_infini, transfer
from infini_transformers.conversion.memory_weights import MemoryWeights
from modeling_infini import InfiniForCausalLM


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import distill


ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "launch" / "retrofit.sh"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a script of bash")

# In the place of Python: succeeds where the command has been run by the test, and ends the script where it has not.
RECORDER = """#!/usr/bin/env bash
command=$(printf '%s\\t' "$@")
grep -qxF -- "$command" {folder}/done && exit
echo "$command" > {folder}/asked_for
exit 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny base, texts, and a transfer of two steps that leaves a memory in random layers too."""
    base_model(max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base", eos_token="w1")
    (tmp_path / "my books").mkdir()
    for seed in range(3):
        (tmp_path / f"my books/{seed}.txt").write_text(random_text(4000, seed))
    module = sys.modules["infini_transformers.conversion.transfer"]
    for name in ("LEAST_MARGIN", "LEAST_OWN_SHARE", "LEAST_MISSING"):
        monkeypatch.setattr(module, name, -9.0)
    monkeypatch.setattr(module._Run, "losses", lambda self, memories, slots: -float(len(memories)))
    monkeypatch.setattr(
        conversion, "attention_transfer", lambda *given, **options: transfer(*given, **{**options, "steps": 2})
    )
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    (tmp_path / "done").touch()
    (tmp_path / "recorder").write_text(RECORDER.format(folder=tmp_path))
    (tmp_path / "recorder").chmod(0o755)
    return tmp_path


def call(folder: Path, texts: str, *options) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, folder / "base", texts, folder / "out", *options]
    environment = {**os.environ, "PYTHON": str(folder / "recorder")}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)


def run_what_was_asked_for(folder: Path, monkeypatch) -> str:
    """Runs, in this process, the command that the script was ended at; returns its name."""
    command = (folder / "asked_for").read_text()
    words = command.rstrip("\n").split("\t")[:-1]
    if words[0] == "-m":
        assert words[1] == "infini_transformers"
        name = words[2]
        with pytest.raises(SystemExit) as ended:
            cli.main(words[2:])
        assert not ended.value.code
    else:
        assert Path(words[0]) == ROOT / "examples/distill.py"
        name = "check" if words[-1] == "--check" else "distill"
        monkeypatch.setattr(sys, "argv", words)
        distill.main()
    with (folder / "done").open("a") as done:
        done.write(command)
    return name


def test_the_same_command_goes_on_until_the_memory_is_there(folder, monkeypatch):
    options = ("--use_cpu", "--max_steps", 2, "--sequence_length", 768, "--tokens_per_step", 768, "--recall_share", 0)
    ran = []
    while (call_of := call(folder, str(folder / "my books"), *options)).returncode:
        assert call_of.returncode == 1, call_of.stderr
        ran.append(run_what_was_asked_for(folder, monkeypatch))
    assert ran == ["convert", "check", "transfer", "save-memory", "distill"]
    assert f"--memory {folder}/out/distilled/memory" in call_of.stdout
    assert "merged" not in call_of.stdout

    results = (folder / "out/transferred", folder / "out/distilled/memory")
    transferred, distilled = map(MemoryWeights.load, results)
    assert transferred.options == distilled.options
    assert distilled.config.layers_with_memory == distilled.config.layers_with_slots == [0, 1]
    assert transferred.digest != distilled.digest
    convert_to_infini(folder / "base", folder / "applied", memory=results[1])
    source, applied = (load_file(folder / name / "model.safetensors") for name in ("base", "applied"))
    assert all(applied[name].equal(source[name]) for name in source)
    assert InfiniForCausalLM.from_pretrained(folder / "applied").config.num_memory_slots == 256

    # What is done is not asked for again.
    (folder / "done").write_text("")
    assert call(folder, str(folder / "my books"), *options).returncode == 0


@pytest.mark.parametrize(("slots", "code"), [(0, 1), (256, 0)])
def test_where_the_transfer_leaves_nothing_to_distil_it_ends(folder, monkeypatch, slots, code):
    """Without slots nothing was learned; with them, their memory is the result. No step is repeated."""
    convert_to_infini(folder / "base", folder / "out/converted", segment_length=256, num_memory_slots=slots)
    monkeypatch.setattr(sys.modules["infini_transformers.conversion.transfer"], "LEAST_MARGIN", 9.0)
    expected = ["check", "transfer", *(["save-memory"] if slots else [])]
    for name in expected:
        assert call(folder, str(folder / "my books"), "--sequence_length", 768).returncode == 1
        assert run_what_was_asked_for(folder, monkeypatch) == name
    (folder / "asked_for").unlink()
    ended = call(folder, str(folder / "my books"), "--sequence_length", 768)
    assert ended.returncode == code
    assert f"--memory {folder}/out/transferred" in ended.stdout if slots else "teach nothing" in ended.stderr
    assert not (folder / "asked_for").exists()


def test_with_lora_the_whole_model_is_named(folder):
    for made in ("converted", "transferred", "distilled/memory", "distilled/merged"):
        (folder / "out" / made).mkdir(parents=True)
    called = call(folder, "a.txt", "--lora_rank", 2, "--lora_layers", "0-1")
    assert called.returncode == 0
    assert f"{folder}/out/distilled/merged" in called.stdout
    assert "--memory" not in called.stdout


def test_several_texts_stand_in_one_argument(folder):
    (folder / "out/converted").mkdir(parents=True)
    assert call(folder, "a.txt b.txt").returncode == 1
    command = (folder / "asked_for").read_text()
    asked_for = command.rstrip("\n").split("\t")
    assert asked_for[3:6] == ["--train_files", "a.txt", "b.txt"]
    (folder / "done").write_text(command)
    assert call(folder, "a.txt b.txt").returncode == 1
    asked_for = (folder / "asked_for").read_text().rstrip("\n").split("\t")
    assert asked_for[2:-1] == ["transfer", str(folder / "out/converted"), "--texts=a.txt", "--texts=b.txt"]


def test_it_says_what_it_needs():
    called = subprocess.run(["bash", str(SCRIPT), "base"], capture_output=True, text=True, check=False)
    assert called.returncode == 2
    assert "BASE TEXTS OUTPUT" in called.stderr
