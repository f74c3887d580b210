"""Attention transfer: the memory learns, and nothing else changes; an interrupted run ends as one that was not."""

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from base_models import base_model
from safetensors.torch import load_file
from test_memory_weights import OPTIONS, loaded, logits
from transformers import AutoTokenizer
from typer.testing import CliRunner
from words import random_text, save_word_tokenizer

from infini_transformers.conversion import convert_from_infini, convert_to_infini, save_memory, transfer
from infini_transformers.conversion.__main__ import app
from infini_transformers.conversion.checkpoints import Checkpoint, is_memory_weight
from infini_transformers.conversion.slot_facts import fact_windows
from infini_transformers.conversion.slot_scores import fit_slot_score
from infini_transformers.conversion.transfer import (
    _calibration_windows,
    _config,
    _LayerTask,
    _Progress,
    _read_texts,
    _Run,
    require_texts,
)
from infini_transformers.evaluation.losses import memory_off
from modeling_infini import InfiniForSequenceClassification


N = 7
module = sys.modules["infini_transformers.conversion.transfer"]
VARIANTS = ["llama", "mistral-window", "qwen2-window", "qwen3"]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.txt").write_text(random_text(400, seed))
    return folder


@pytest.fixture
def keep_all(monkeypatch):
    """Random layers have nothing to remember that is of one text alone."""
    monkeypatch.setattr(module, "LEAST_MARGIN", -9.0)
    monkeypatch.setattr(module, "LEAST_OWN_SHARE", 0.0)
    monkeypatch.setattr(module, "LEAST_MISSING", 0.0)
    monkeypatch.setattr(_Run, "losses", lambda self, memories, slots: -float(len(memories)))


def converted(tmp_path, variant="llama", **options):
    base_model(variant).save_pretrained(tmp_path / "base")
    folder = convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N, **options)
    # Here, since transformers gives a Qwen2 another class of tokenizers.
    save_word_tokenizer(folder)
    return folder


def base_bytes(folder):
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.shapes if not is_memory_weight(name)}


@pytest.mark.parametrize(
    ("variant", "options"), [*((variant, {}) for variant in VARIANTS), ("llama", OPTIONS | {"memory_layers": None})]
)
def test_only_the_memory_changes(tmp_path, texts, keep_all, variant, options):
    folder = converted(tmp_path, variant, **options)
    before, model = base_bytes(folder), loaded(folder)
    with memory_off(model):
        off = logits(model)
    done = transfer(folder, [texts], steps=3, teacher=tmp_path / "base")
    assert done.memory_layers == [0, 1]
    assert done.slot_layers == ([0, 1] if options else [])
    after = base_bytes(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = loaded(folder)
    assert (model.config.memory_feature_map, model.config.token_gates) == ("exp", True)
    assert model.model.layers[1].self_attn.memory.token_gate.weight.abs().sum() > 0
    assert all(layer.self_attn.slot_score.weight.any() for layer in model.model.layers if options)
    with memory_off(model):
        assert torch.equal(logits(model), off)
    assert not torch.equal(logits(model), off)
    assert not (folder / ".transfer").exists()
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    convert_from_infini(folder, tmp_path / "again", drop_gates=True)
    source, again = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "again"))
    assert source.keys() == again.keys()
    assert all(torch.equal(source[name], again[name]) for name in source)


@pytest.mark.parametrize("variant", [*VARIANTS, "qwen3-biases"])
def test_the_teacher_is_the_base(tmp_path, texts, variant):
    folder = converted(tmp_path, variant)
    run = run_of(folder, texts, tmp_path)
    hidden_states = run.embedded()
    expected = base_model(variant)(run.ids, output_hidden_states=True).hidden_states
    # The last ones of transformers are after the norm.
    with torch.no_grad():
        run.attend(0, hidden_states)
    torch.testing.assert_close(hidden_states, expected[1], rtol=1e-4, atol=1e-4)


def run_of(folder, texts, tmp_path):
    config = _config(Checkpoint(folder).infini_config, memory_feature_map="exp", token_gates=True, memory_layers=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, of_texts, _ = _calibration_windows(tokenizer, _read_texts([texts], 0), 8 * N, 8 * N * 9)
    return _Run(Checkpoint(folder), config, ids, torch.float32, _Progress(tmp_path / "progress", {}), of_texts)


def student_of(run, layer):
    return run.layer(run.config, layer, module.initial_memory_weights(run.config, layer)).self_attn


@pytest.mark.parametrize("num_memory_slots", [0, 5])
def test_the_error_falls_and_is_that_of_the_model(tmp_path, texts, num_memory_slots):
    folder = converted(tmp_path, head_gate_init_value=0.5, num_memory_slots=num_memory_slots)
    run = run_of(folder, texts, tmp_path)
    hidden_states, student = run.embedded(), student_of(run, 0)
    states = hidden_states.clone()
    with torch.no_grad():
        examples, held_out = run.examples(student, run.attend(0, hidden_states)[1])
    task = _LayerTask(student, run.call(run.config, True)["layout"])
    others = [*range(1, len(examples)), 0]
    untrained = task.explained(examples, others)[0]
    task.train(examples, 60, 0)
    assert task.explained(examples, others)[0] > untrained + 0.05

    # The output of the layer's own attention, with the memory that it has learned.
    normed = run.layer(run.config, 0, module.initial_memory_weights(run.config, 0)).input_layernorm(states[0:1])
    with torch.no_grad():
        output = student(normed, **run.call(run.config, True))[0][0, N:]
        target = torch.nn.functional.linear(held_out[0].target.flatten(1), student.o_proj.weight)[N:]
        error, _ = task.error(held_out[0], task.memory(held_out[0]), slice(None))
    torch.testing.assert_close((output - target).square().sum(), error)


def test_slots_keep_what_is_stated(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(module, "LEAST_MISSING", 0.0)
    monkeypatch.setattr(module, "LEAST_MARGIN", 9.0)
    folder = converted(tmp_path, num_memory_slots=4)
    done = transfer(folder, [texts], steps=1, dtype=torch.float32)
    assert (done.memory_layers, done.slot_layers) == ([], [0, 1])
    model = loaded(folder)
    assert (model.config.memory_layers, model.config.slot_layers) == ([], [0, 1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    used = _calibration_windows(tokenizer, _read_texts([texts], 0), 8 * N, 57_344)[2]
    ids, is_fact = fact_windows(tokenizer, used, 8 * N, module.FACT_WINDOWS, 0)
    base = base_model()
    with torch.no_grad():
        states = base(ids, output_hidden_states=True).hidden_states
        for layer, of_layer, inputs in zip(model.model.layers, base.model.layers, states):
            expected = fit_slot_score(list(of_layer.input_layernorm(inputs)[:, 4:]), is_fact[:, 4:])
            torch.testing.assert_close(layer.self_attn.slot_score.weight.data, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("num_memory_slots", [0, 3])
def test_an_interrupted_run_goes_on(tmp_path, texts, keep_all, num_memory_slots):
    folder = converted(tmp_path, num_memory_slots=num_memory_slots)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def interrupt(layer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(folder, [texts], steps=3, report=interrupt)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    with pytest.raises(ValueError, match=r"unfinished run with other arguments \(steps\)"):
        transfer(folder, [texts], steps=4)
    reported = []
    transfer(folder, [texts], steps=3, report=reported.append)
    assert [layer.layer for layer in reported] == [1]
    options = {"segment_length": N, "num_memory_slots": num_memory_slots}
    convert_to_infini(tmp_path / "base", tmp_path / "other", **options)
    save_word_tokenizer(tmp_path / "other")
    transfer(tmp_path / "other", [texts], steps=3)
    found, expected = loaded(folder).state_dict(), loaded(tmp_path / "other").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("slots_stay", [True, False])
def test_a_run_that_is_killed_as_it_tidies_up_has_ended(tmp_path, texts, keep_all, monkeypatch, slots_stay):
    folder = converted(tmp_path, num_memory_slots=3)
    if not slots_stay:
        monkeypatch.setattr(module, "LEAST_MISSING", 9.0)

    remove = shutil.rmtree

    def killed(path, *args, **kwargs):
        if not (Path(path) / "arguments.json").exists():
            return remove(path, *args, **kwargs)
        (Path(path) / "arguments.json").unlink()
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", killed)
        with pytest.raises(InterruptedError):
            transfer(folder, [texts], steps=3)
    reported = []
    transfer(folder, [texts], steps=4, seed=1, report=reported.append)
    assert [layer.layer for layer in reported] == [0, 1]
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_a_conversion_may_teach_its_memory_at_once(tmp_path, texts, keep_all):
    base_model().save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base")
    folder = convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N, transfer=[texts / "0.txt"] * 2)
    assert loaded(folder).config.memory_layers == [0, 1]
    options = {"segment_length": N, "transfer": [texts]}
    with pytest.raises(ValueError, match="Leave out either transfer, or memory and head_gates"):
        convert_to_infini(tmp_path / "base", tmp_path / "other", head_gates=[0, 0], **options)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        convert_to_infini(tmp_path / "base", tmp_path / "other", **options | {"transfer": [tmp_path / "nothing"]})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "lengths", [[600] * 2, [600] * 3, [600] * 7, [600] * 8, [600] * 14, [30, *[600] * 7], [30, 60, *[600] * 7]]
)
def test_another_texts_memory_is_of_another_text(tmp_path, lengths):
    """However many texts there are, and whichever of them end early."""
    folder = converted(tmp_path)
    files = [tmp_path / f"{number}.txt" for number in range(len(lengths))]
    for number, file in enumerate(files):
        file.write_text(random_text(lengths[number], number))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, texts, _ = _calibration_windows(tokenizer, _read_texts(files, 0), 3 * N, 3 * N * 28)
    run = _Run(Checkpoint(folder), None, ids, torch.float32, None, texts)
    assert len(texts) == 28
    assert len(run.held_out) == 4
    held_out = [texts[window] for window in run.held_out]
    assert all(one != other for one, other in pairwise(held_out))
    assert all(held_out[other] != own for own, other in zip(held_out, run.foreign))


@torch.no_grad()
def test_a_layer_learns_or_not_by_one_decision(tmp_path, texts, monkeypatch):
    """Also where what is missing is the limit itself, but for rounding, and where the output is nothing."""
    run = run_of(converted(tmp_path), texts, tmp_path)
    monkeypatch.setattr(module, "LEAST_MISSING", 0.0)
    missing = run.attend(0, run.embedded())[0]
    for limit, count in ((missing, 9), (missing * 1.001, 2)):
        monkeypatch.setattr(module, "LEAST_MISSING", limit)
        found, read, _ = run.attend(0, run.embedded())
        assert found == missing
        assert len(read) == count
    of_zeros = {"model.layers.0.self_attn.o_proj.weight": torch.zeros(24, 24)}
    monkeypatch.setattr(run, "read", lambda name: of_zeros.get(name, run.weights.read(name)))
    missing, read, _ = run.attend(0, run.embedded())
    assert (missing, len(read)) == (0.0, 2)


def test_a_conversion_in_float16_has_its_base_for_a_teacher(tmp_path, texts):
    converted(tmp_path)
    convert_to_infini(tmp_path / "base", tmp_path / "half", segment_length=N, dtype="float16")
    save_word_tokenizer(tmp_path / "half")
    transfer(tmp_path / "half", [texts], steps=1, teacher=tmp_path / "base")


def test_layers_of_no_use_get_no_memory(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(module, "LEAST_MISSING", 2.0)
    folder = converted(tmp_path)
    result = CliRunner().invoke(app, ["transfer", str(folder), "--texts", str(texts), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "layer 1: the window leaves" in result.output
    assert "has no memory now" in result.output
    assert loaded(folder).config.memory_layers == []


def test_the_command_says_what_has_slots(tmp_path, texts, keep_all):
    base_model().save_pretrained(tmp_path / "base")
    folder = tmp_path / "ours"
    options = ["--segment-length", str(N), "--num-memory-slots", "3"]
    result = CliRunner().invoke(app, ["to-infini", str(tmp_path / "base"), str(folder), *options])
    assert result.exit_code == 0, result.output
    assert loaded(folder).config.num_memory_slots == 3
    save_word_tokenizer(folder)
    result = CliRunner().invoke(app, ["transfer", str(folder), "--texts", str(texts), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "has a memory in the layers 0, 1 and slots in the layers 0, 1" in result.output


def test_a_memory_that_explains_less_than_nothing_is_not_kept(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(module, "LEAST_MISSING", 0.0)
    monkeypatch.setattr(_LayerTask, "explained", lambda *arguments: (-4.67, -4.83))
    assert transfer(converted(tmp_path), texts, steps=1).memory_layers == []


def test_bad_input_is_refused(tmp_path, texts):
    folder = converted(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        transfer(folder, [tmp_path / "nothing"])
    with pytest.raises(ValueError, match="at least 9 are needed"):
        transfer(folder, [texts / "0.txt"], tokens=100)
    with pytest.raises(ValueError, match=r"There is no \.txt file"):
        transfer(folder, [folder])
    (texts / "latin.txt").write_bytes(b"\xe9" * 9)
    with pytest.raises(ValueError, match="no text in UTF-8"):
        transfer(folder, [texts / "latin.txt"])
    with pytest.raises(ValueError, match="is no Infini-attention checkpoint"):
        transfer(tmp_path / "base", [texts])
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        transfer(tmp_path / "nothing", [texts])
    other = base_model()
    torch.nn.init.ones_(other.model.layers[0].self_attn.q_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the base of"):
        transfer(folder, [texts], teacher=tmp_path / "other")
    InfiniForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"holds score.weight, and is no causal language model"):
        transfer(tmp_path / "classifier", [texts])
    convert_to_infini(tmp_path / "base", tmp_path / "long", segment_length=25)
    save_word_tokenizer(tmp_path / "long")
    with pytest.raises(ValueError, match="three segments are needed"):
        transfer(tmp_path / "long", [texts])
    assert not (folder / ".transfer").exists()


def test_texts_that_are_too_short_leave_no_conversion(tmp_path, texts):
    base_model("llama").save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base")
    (tmp_path / "short.txt").write_text("too short")
    for wrong in ([tmp_path / "short.txt"], [texts / "0.txt"]):
        with pytest.raises(ValueError, match=r"windows of 56 tokens; at least 9"):
            convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N, transfer=wrong)
    options = {"local_attention": "segment", "transfer": [texts]}
    with pytest.raises(ValueError, match="three segments are needed"):
        convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=30, **options)
    for name, value in {"memory_layers": [1], "memory_feature_map": "elu", "head_gate_init_value": 1.0}.items():
        with pytest.raises(ValueError, match=f"transfer decides on {name} itself"):
            convert_to_infini(
                tmp_path / "base", tmp_path / "ours", segment_length=N, transfer=[texts], **{name: value}
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "books", "short.txt"]


def test_the_default_is_enough_for_long_windows(tmp_path, texts, monkeypatch):
    """With segments of 1024, 57,344 tokens are 7 windows."""
    monkeypatch.setattr(module, "TOKENS", 7 * 8 * N)
    folder = converted(tmp_path)
    assert len(module._calibration(folder, Checkpoint(folder).infini_config, [texts])[1][0]) == 9


def test_texts_of_no_use_are_counted(tmp_path, texts, caplog):
    folder = converted(tmp_path)
    (texts / "short.txt").write_text(random_text(8 * N - 1, 9))
    require_texts(folder, [texts])
    assert f"1 texts are of no use: they have fewer than {8 * N} tokens" in caplog.text


def test_an_interrupted_run_says_how_to_go_on(tmp_path, texts, keep_all, monkeypatch, caplog):
    folder = converted(tmp_path)
    train = _LayerTask.train

    def interrupted(task, *args):
        if task.attention.layer_idx == 1:
            raise KeyboardInterrupt
        train(task, *args)

    monkeypatch.setattr(_LayerTask, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transfer(folder, [texts], steps=3)
    assert f"Interrupted: {folder} is as it was. The same call or command goes on" in caplog.text
    with pytest.raises(ValueError, match=r"other arguments \(seed\)"):
        transfer(folder, [texts], steps=3, seed=1)
    with pytest.raises(ValueError, match=r"other arguments \(texts or tokens, steps\)"):
        transfer(folder, [texts], steps=4, tokens=9 * 8 * N)
    monkeypatch.setattr(_LayerTask, "train", train)
    transfer(folder, [texts], steps=3)
    assert "An unfinished run goes on: 1 of 2 layers are done." in caplog.text
    assert "taught or applied already" not in caplog.text


def test_a_memory_that_is_replaced_is_named(tmp_path, texts, keep_all, caplog):
    folder = converted(tmp_path)
    transfer(folder, [texts], steps=1)
    assert "taught or applied already" not in caplog.text
    transfer(folder, [texts], steps=1)
    assert "has a memory that was taught or applied already: it is learned anew" in caplog.text


def test_a_conversion_without_a_tokenizer_says_where_one_comes_from(tmp_path, texts):
    base_model("llama").save_pretrained(tmp_path / "base")
    folder = convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N)
    with pytest.raises(ValueError, match=r"has no tokenizer that can be loaded.*AutoTokenizer"):
        transfer(folder, [texts])
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded, by which transfer reads"):
        convert_to_infini(tmp_path / "base", tmp_path / "other", segment_length=N, transfer=[texts])
    assert not (tmp_path / "other").exists()


def test_a_memory_that_nobody_taught_is_saved_with_a_warning(tmp_path, texts, keep_all, caplog):
    folder = converted(tmp_path)
    save_memory(folder, tmp_path / "untaught")
    assert "nobody has taught it anything" in caplog.text
    caplog.clear()
    transfer(folder, [texts], steps=1)
    save_memory(folder, tmp_path / "taught")
    assert "nobody" not in caplog.text
