"""Distillation from the base: exact in chunks, of the memory alone; and the script `examples/distill.py`."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from base_models import base_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import EVERY_OPTION, VOCABULARY, random_ids, tiny_model
from torch import nn
from torch.nn import functional as F
from training import cpu_arguments
from words import random_text, save_word_tokenizer

from infini_transformers.conversion import convert_to_infini, load_memory
from infini_transformers.conversion.checkpoints import is_memory_weight
from infini_transformers.conversion.memory_weights import MemoryWeights
from infini_transformers.conversion.shared_base import base_of
from infini_transformers.evaluation.losses import window_losses
from modeling_infini import InfiniForCausalLM
from modeling_infini.training import (
    DistillationTrainer,
    InfiniTrainingArguments,
    distillation,
    divergence,
    train_memory_alone,
    window_states,
)


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import distill


# Whatever a memory may have, in one layer of two.
MEMORY = {
    "local_attention": "sliding",
    "num_sink_tokens": 1,
    "memory_layers": [1],
    "memory_feature_map": "exp",
    "memory_norm_init_scale": 1.5,
    "memory_write_gate": True,
    "token_gates": True,
    "num_memory_slots": 2,
}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def trainer_of(model, folder, teacher=None, rows=(), **options) -> DistillationTrainer:
    window = options.pop("teacher_window", 16)
    arguments = InfiniTrainingArguments(**cpu_arguments(folder, max_steps=1, **options))
    return DistillationTrainer(
        model,
        arguments,
        data_collator=lambda batches: batches[0],
        train_dataset=list(rows),
        teacher=base_of(model) if teacher is None else teacher,
        teacher_window=window,
    )


def test_the_base_is_the_source_and_shares_its_weights(tmp_path):
    source = base_model("qwen2")
    source.save_pretrained(tmp_path / "base")
    convert_to_infini(tmp_path / "base", tmp_path / "converted", segment_length=4)
    model = InfiniForCausalLM.from_pretrained(tmp_path / "converted")
    base = base_of(model)
    ids = random_ids(2, 23)
    assert torch.equal(base(ids).logits, source(ids).logits)
    own = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in base.parameters()} <= own
    assert not any(weight.requires_grad for weight in base.parameters())


@pytest.mark.parametrize("length", [3, 8, 9, 12, 13, 29])
def test_a_teacher_sees_at_least_half_a_window(length):
    teacher = base_model(max_position_embeddings=8)
    ids = random_ids(1, length)
    logits = teacher.lm_head(window_states(teacher, ids, 8))[0, :-1]
    losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
    expected = window_losses(teacher, ids, 8)
    # The others are predicted by the last token of a window here, and by one in the midst of the next one there.
    same = [place for place in range(length - 1) if place < 7 or place % 4 != 3]
    torch.testing.assert_close(losses[same], expected[same])
    assert window_states(teacher, random_ids(3, length), 8).shape == (3, length, 24)


def test_divergence_is_that_of_all_logits_and_so_is_its_gradient(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(distillation, "LOGITS_OF_SLICE", 3 * VOCABULARY)
    head, teacher_head = nn.Linear(6, VOCABULARY).double(), nn.Linear(4, VOCABULARY).double()
    states, of_teacher = torch.randn(10, 6, dtype=torch.double, requires_grad=True), torch.randn(10, 4).double()
    expected = teacher_head(of_teacher).softmax(-1)
    total = (expected * (expected.log() - head(states).log_softmax(-1))).sum()
    found = divergence(states, head, of_teacher, teacher_head)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(
        torch.autograd.grad(3 * found, states), torch.autograd.grad(3 * total, states), rtol=1e-9, atol=1e-12
    )
    with torch.no_grad():
        torch.testing.assert_close(divergence(states, head, of_teacher, teacher_head), total)
    assert divergence(states[:0], head, of_teacher[:0], teacher_head) == 0


def plain_loss(model, teacher, batch, window: int) -> torch.Tensor:
    """The loss in one call, from all logits."""
    found = model(batch["input_ids"], use_cache=False).logits.log_softmax(-1)
    expected = teacher.lm_head(window_states(teacher, batch["input_ids"], window)).log_softmax(-1)
    labels, weights = batch["shift_labels"], batch["answer_weights"]
    distances = (expected.exp() * (expected - found)).sum(-1)
    answers = -found.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    per_token = torch.where(weights > 0, weights * answers, distances)
    return per_token[labels != -100].sum() / (labels != -100).sum()


def batch_of(rows: int, length: int, first: int = 5) -> dict[str, torch.Tensor]:
    ids = random_ids(rows, length)
    shift_labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    shift_labels[:, :first] = -100
    weights = torch.zeros(rows, length)
    weights[0, -4:-1] = 2.5
    return {"input_ids": ids, "shift_labels": shift_labels, "answer_weights": weights}


@pytest.mark.parametrize("chunk_segments", [None, 1, 3])
def test_a_step_in_chunks_is_that_of_one_call(tmp_path, chunk_segments):
    model = tiny_model(torch.float64, **MEMORY)
    train_memory_alone(model)
    teacher = base_of(model)
    batch = batch_of(2, 33)
    loss = plain_loss(model, teacher, batch, 16)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    trainer = trainer_of(model, tmp_path, teacher, [batch], chunk_segments=chunk_segments)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    found = trainer.training_step(model, batch)
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    assert expected.keys() == gradients(model).keys()
    assert all(".memory." in name or "head_gates" in name for name in expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-9)
    assert all(gradient.any() for gradient in expected.values())


def test_training_moves_the_memory_alone_and_evaluates(tmp_path):
    model = tiny_model(torch.float32, **MEMORY)
    train_memory_alone(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = [batch_of(2, 33) for _ in range(4)]
    options = {"max_grad_norm": 0.0, "learning_rate": 1e-2, "chunk_segments": 2, "logging_steps": 1}
    arguments = InfiniTrainingArguments(
        **cpu_arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=1, **options)
    )
    trainer = DistillationTrainer(
        model,
        arguments,
        data_collator=lambda batches: batches[0],
        train_dataset=batches,
        eval_dataset=batches[:1],
        teacher=base_of(model),
        teacher_window=16,
    )
    arguments.prediction_loss_only = True
    arguments.per_device_eval_batch_size = 1
    batches[0]["answer_weights"] = torch.zeros(2, 33)
    first = trainer.evaluate()["eval_loss"]
    assert first == pytest.approx(plain_loss(model, trainer.teacher, batches[0], 16).item(), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    assert all(entry["divergence"] > 0 for entry in logs)
    assert sum("answer_loss" in entry for entry in logs) == 3
    for name, weight in model.state_dict().items():
        moved = not torch.equal(weight, before[name])
        assert moved == ("memory" in name or "head_gates" in name), name


def test_metrics_are_of_the_logits_of_all_tokens(tmp_path):
    model = tiny_model(**MEMORY)
    train_memory_alone(model)
    seen = []
    arguments = InfiniTrainingArguments(**cpu_arguments(tmp_path, per_device_eval_batch_size=1, chunk_segments=2))
    trainer = DistillationTrainer(
        model,
        arguments,
        data_collator=lambda batches: batches[0],
        eval_dataset=[batch_of(2, 33)],
        compute_metrics=lambda output: seen.append(output) or {},
        teacher=base_of(model),
        teacher_window=16,
    )
    loss = trainer.evaluate()["eval_loss"]
    batch = batch_of(2, 33)
    expected = model(batch["input_ids"]).logits.detach()
    output = trainer.predict([batch])
    unlabelled = trainer.predict([{"input_ids": batch["input_ids"]}])
    for predictions in (seen[0].predictions, output.predictions, unlabelled.predictions):
        torch.testing.assert_close(torch.from_numpy(predictions), expected)
    for label_ids in (seen[0].label_ids, output.label_ids):
        assert torch.equal(torch.from_numpy(label_ids), F.pad(batch["shift_labels"], (1, -1), value=-100))
    assert output.metrics["test_loss"] == pytest.approx(loss)
    # For a loss alone, one of each call is enough.
    kept = []
    model.register_forward_pre_hook(lambda _, __, kw: kept.append(kw["logits_to_keep"]), with_kwargs=True)
    trainer.compute_metrics = None
    trainer.evaluate()
    assert {*kept} == {1}


@pytest.mark.parametrize("has_answers", [False, True])
def test_documents_have_answer_weights(tmp_path, has_answers):
    """Beside the columns that the default collator reads."""
    model = tiny_model(**MEMORY)
    train_memory_alone(model)
    batch = batch_of(2, 33)
    batch["shift_labels"][1, 20:] = -100
    lengths = [33, 21]
    names = ["input_ids", "shift_labels", *(["answer_weights"] if has_answers else [])]
    if not has_answers:
        batch["answer_weights"].zero_()
    rows = [{name: batch[name][row, :length].tolist() for name in names} for row, length in enumerate(lengths)]
    arguments = InfiniTrainingArguments(**cpu_arguments(tmp_path, per_device_eval_batch_size=2, max_steps=1))
    options = {"train_dataset": rows, "eval_dataset": rows, "teacher": base_of(model), "teacher_window": 16}
    trainer = DistillationTrainer(model, arguments, **options)
    expected = plain_loss(model, trainer.teacher, batch, 16).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    trainer.train()
    with pytest.raises(ValueError, match="some have answer_weights and some have not"):
        trainer.data_collator([rows[0] | {"answer_weights": [0.5] * 33}, rows[1] | {"answer_weights": None}])


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_answers_that_count_less_than_nothing_are_refused(tmp_path, weight):
    model = tiny_model(**MEMORY)
    train_memory_alone(model)
    batch = batch_of(2, 33)
    trainer = trainer_of(model, tmp_path, rows=[batch])
    batch["answer_weights"][0, 3] = weight
    with pytest.raises(ValueError, match="answer_weights must be finite and not negative"):
        trainer.train()
    batch["answer_weights"] = torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"answer_weights are of the shape \(2, 1\), and input_ids of \(2, 33\)"):
        trainer.train()


def test_what_cannot_teach_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no layer with a memory \(memory_layers=\[\]\)"):
        train_memory_alone(tiny_model(memory_layers=[]))
    model = tiny_model()
    with pytest.raises(ValueError, match="head must stand still"):
        trainer_of(model, tmp_path)
    train_memory_alone(model)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="a vocabulary of 40 tokens, the model of 31"):
        trainer_of(model, tmp_path, base_model(vocab_size=40))
    for window in (7, 0, 66):
        with pytest.raises(ValueError, match=f"teacher_window={window} must be an even number"):
            trainer_of(model, tmp_path, teacher_window=window)


def test_the_weights_of_a_bfloat16_memory_are_trained_in_float32():
    model = tiny_model(torch.bfloat16, **MEMORY)
    train_memory_alone(model)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


# The script.


@pytest.fixture
def folder(tmp_path):
    """A conversion of a tiny Llama, and texts."""
    base_model(max_position_embeddings=256).save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base", eos_token="w1")
    options = {name: value for name, value in MEMORY.items() if name not in ("local_attention", "num_sink_tokens")}
    convert_to_infini(tmp_path / "base", tmp_path / "converted", segment_length=16, **options)
    (tmp_path / "books").mkdir()
    for index, words in enumerate((700, 90, 10)):
        (tmp_path / f"books/{index}.txt").write_text(random_text(words, seed=index))
    return tmp_path


def run(folder: Path, monkeypatch, output: str, *options) -> Path:
    arguments = ["--model", folder / "converted", "--train_files", folder / "books", "--use_cpu"]
    arguments += ["--output_dir", folder / output, "--sequence_length", 192, "--tokens_per_step", 192]
    arguments += ["--chunk_segments", 4, "--recall_share", 0.5, "--recall_lengths", 160, 192]
    arguments += ["--logging_steps", 1, "--warmup_steps", 0]
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, [*arguments, *options])])
    distill.main()
    return folder / output


def test_the_script_trains_the_memory_and_saves_it_by_itself(folder, monkeypatch):
    held_out = ("--eval_files", folder / "books/0.txt")
    output = run(folder, monkeypatch, "distilled", "--max_steps", 4, "--save_steps", 2, *held_out)
    trained = MemoryWeights.load(output / "memory")
    model = InfiniForCausalLM.from_pretrained(folder / "converted")
    names = {name for name, _ in model.named_parameters() if is_memory_weight(name)}
    assert trained.weights.keys() == names
    assert any((weight != dict(model.named_parameters())[name]).any() for name, weight in trained.weights.items())
    # What comes of it has the base's weights, byte for byte.
    convert_to_infini(folder / "base", folder / "applied", segment_length=16, memory=output / "memory")
    source, applied = (load_file(folder / name / "model.safetensors") for name in ("base", "applied"))
    assert all(torch.equal(source[name], applied[name]) for name in source)
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] > 0
    # A checkpoint holds what is trained, and few files.
    (checkpoint,) = output.glob("checkpoint-*")
    assert load_file(checkpoint / "model.safetensors").keys() == {name for name in names if "slot_score" not in name}
    assert len(list(checkpoint.iterdir())) == 6


def test_the_script_goes_on_where_it_was_stopped(folder, monkeypatch):
    whole = run(folder, monkeypatch, "whole", "--max_steps", 4, "--save_steps", 2, "--save_total_limit", 3)
    (folder / "stopped").mkdir()
    shutil.copytree(whole / "checkpoint-2", folder / "stopped/checkpoint-2")
    stopped = run(folder, monkeypatch, "stopped", "--max_steps", 4, "--save_steps", 2)
    expected, found = (MemoryWeights.load(output / "memory").weights for output in (whole, stopped))
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())
    history = json.loads((stopped / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    # Called once more, there is nothing left to do.
    run(folder, monkeypatch, "stopped", "--max_steps", 4)


def test_a_checkpoint_of_another_base_is_not_continued(folder, monkeypatch):
    """Its memory would be saved as this base's."""
    run(folder, monkeypatch, "distilled", "--max_steps", 2, "--save_steps", 1)
    other = base_model(max_position_embeddings=256)
    other.model.layers[0].mlp.up_proj.weight.data *= 1.3
    other.save_pretrained(folder / "base")
    shutil.rmtree(folder / "converted")
    options = {name: value for name, value in MEMORY.items() if name not in ("local_attention", "num_sink_tokens")}
    convert_to_infini(folder / "base", folder / "converted", segment_length=16, **options)
    with pytest.raises(ValueError, match="was trained with other weights than this model has"):
        run(folder, monkeypatch, "distilled", "--max_steps", 3)


def test_a_run_goes_on_with_what_it_was_started_with(folder, monkeypatch):
    run(folder, monkeypatch, "distilled", "--max_steps", 1, "--save_steps", 1)
    (folder / "more.txt").write_text(random_text(700, seed=5))
    with pytest.raises(ValueError, match=r"was started with other arguments \(train_files, seed\)"):
        run(folder, monkeypatch, "distilled", "--max_steps", 2, "--train_files", folder / "more.txt", "--seed", 4)
    run(folder, monkeypatch, "distilled", "--max_steps", 2)


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(folder, monkeypatch, caplog):
    output = run(folder, monkeypatch, "distilled", "--max_steps", 1, "--save_steps", 1)
    (output / "recipe.json").unlink()
    file = output / "checkpoint-1" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    run(folder, monkeypatch, "distilled", "--max_steps", 2)
    assert "was written by an earlier version" in caplog.text
    assert (output / "recipe.json").exists()


@pytest.mark.parametrize("lora", [(), ("--lora_rank", 2, "--lora_layers", "1-1")], ids=["memory", "lora"])
def test_the_best_is_what_is_saved(folder, monkeypatch, lora):
    options = ("--max_steps", 3, "--save_steps", 1, "--learning_rate", 3, "--eval_steps", 1)
    options += ("--eval_strategy", "steps", "--eval_files", folder / "books/0.txt", "--load_best_model_at_end", "True")
    output = run(folder, monkeypatch, "best", *options, *lora)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert min(losses) < losses[2]
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] == pytest.approx(min(losses))


def test_what_could_not_be_saved_is_not_trained(folder, monkeypatch):
    with pytest.raises(ValueError, match="are in another dtype"):
        run(folder, monkeypatch, "half", "--dtype", "float16")
    assert not list((folder / "half").glob("checkpoint-*"))


def test_a_check_trains_nothing(folder, monkeypatch):
    output = run(folder, monkeypatch, "checked", "--check", "True")
    assert not list(output.iterdir())
    with pytest.raises(ValueError, match="add --bf16"):
        run(folder, monkeypatch, "checked", "--check", "True", "--dtype", "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_adapts_the_layers_that_are_named(folder, monkeypatch, dtype):
    options = ("--lora_rank", 2, "--lora_layers", "1-1", "--max_steps", 3, "--save_steps", 2)
    options += ("--dtype", dtype, "--bf16") if dtype == "bfloat16" else ()
    output = run(folder, monkeypatch, f"adapted-{dtype}", *options)
    before = InfiniForCausalLM.from_pretrained(folder / "converted", dtype=dtype).state_dict()
    after = InfiniForCausalLM.from_pretrained(output / "merged").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    projections = {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert projections < changed
    assert all(".memory." in name or "head_gates" in name for name in changed - projections)

    # Its parts, on a conversion of the source.
    model = InfiniForCausalLM.from_pretrained(folder / "converted", dtype=dtype)
    load_memory(model, output / "memory")
    again = PeftModel.from_pretrained(model, output / "adapter").merge_and_unload().state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in after.items())


def test_bfloat16_weights_are_trained_by_autocast(folder, monkeypatch):
    with pytest.raises(ValueError, match="add --bf16"):
        run(folder, monkeypatch, "refused", "--dtype", "bfloat16")
    output = run(folder, monkeypatch, "half", "--dtype", "bfloat16", "--bf16", "--max_steps", 2)
    assert {weight.dtype for weight in MemoryWeights.load(output / "memory").weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recall_share", 2), "--recall_share is of all batches"),
        (("--recall_tasks", "passkei"), "there is no passkei"),
        (("--lora_rank", 4), "go together"),
        (("--lora_rank", 4, "--lora_layers", "top"), "first-last"),
        (("--lora_rank", 4, "--lora_layers", "1-0"), "first-last"),
        (("--lora_rank", 4, "--lora_layers", "1-7"), "--lora_layers 1-7: the model has 2"),
        (("--recall_lengths", 16), "fit into one segment of 16"),
        (("--recall_lengths", 192, 160), "grow from stage to stage"),
        (("--recall_lengths", 48, 160), "48 are too few"),
        (("--max_steps", -1), "say by --max_steps"),
        (("--bf16_full_eval", True), "rounds the weights that are saved"),
        (("--eval_files", "{folder}/books/2.txt"), "No text of .*2.txt has 32 tokens"),
        (("--per_device_train_batch_size", 2), "leave batch sizes out"),
    ],
)
def test_what_cannot_be_done_is_refused(folder, monkeypatch, options, message):
    options = [str(option).format(folder=folder) for option in options]
    with pytest.raises(ValueError, match=message):
        run(folder, monkeypatch, "refused", *options)


def texts_of(folder: Path, **options) -> distill.DistillationTexts:
    recipe = distill.RecipeArguments(
        model="", train_files=[], sequence_length=192, tokens_per_step=400, recall_lengths=[64, 192], **options
    )
    documents = [{"input_ids": random_ids(count, seed=count)} for count in (20, 5000)]
    tokenizer = distill.load_tokenizer(folder / "base")
    return distill.DistillationTexts(distill.Passages(documents, 32), tokenizer, 16, recipe, 200, seed=0)


def test_batches_depend_on_their_number_alone_and_questions_grow(folder):
    texts = texts_of(folder, recall_share=0.5, recall_tasks=["mqar"])
    questions = []
    for index in range(len(texts)):
        batch, again = texts[index], texts[index]
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        assert (batch["shift_labels"][:, :16] == -100).all()
        is_answer = batch["answer_weights"] > 0
        targets = F.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
        assert torch.equal(batch["shift_labels"][:, 16:-1], targets[:, 16:-1])
        if is_answer.any():
            questions.append((index, batch["input_ids"].shape))
            assert (is_answer.sum(1) == 8).all()
            # All answers of a text count as much as its other tokens.
            others = ((batch["shift_labels"] != -100) & ~is_answer).sum(1)
            torch.testing.assert_close(batch["answer_weights"].sum(1), others.float())
        else:
            assert batch["input_ids"].shape == (2, 192)
    assert 80 < len(questions) < 120
    assert {shape for index, shape in questions if index < 100} == {(6, 64)}
    later = {shape for index, shape in questions if index >= 100}
    assert (2, 192) in later
    assert len(later) > 2


def test_documents_that_are_shorter_than_a_passage_are_read_whole(folder):
    passages = distill.Passages([{"input_ids": random_ids(count, seed=count)} for count in (20, 100, 50)], 32)
    generator = np.random.default_rng(0)
    assert {len(passages.draw(80, generator)) for _ in range(40)} == {50, 80}
    assert [len(ids) for ids in passages.starts(80)] == [80, 50]
    rows = [texts_of(folder).distilled(passages.draw(80, generator)[:length]) for length in (40, 50)]
    batch = distill.padded(rows)
    assert batch["attention_mask"].sum(1).tolist() == [40, 50]
    assert (batch["shift_labels"][0, 39:] == -100).all()
    with pytest.raises(ValueError, match=r"No text of a\.txt has 200 tokens"):
        distill.Passages([{"input_ids": random_ids(100)}], 200, ["a.txt"])


def test_rows_that_the_teacher_would_misread_are_refused():
    ids = random_ids(2, 6)
    restarts = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    left = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for inputs, message in (
        ({"position_ids": restarts}, "one document per row"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]] * 2)}, "one document per row"),
        ({"attention_mask": left}, "on the right alone"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation._require_one_text_per_row({"input_ids": ids, **inputs})
    distillation._require_one_text_per_row({"input_ids": ids, "attention_mask": left.flip(1)})


def test_a_memory_that_was_trained_in_float32_works_in_a_bfloat16_model():
    model = tiny_model(torch.bfloat16, **EVERY_OPTION)
    train_memory_alone(model)
    ids = random_ids(1, 17)
    assert model(ids).logits.dtype == torch.bfloat16
    assert model.generate(ids, max_new_tokens=3).shape == (1, 20)
