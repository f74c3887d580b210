"""The recipe of `examples/train_passkey.py`: its stages, what it holds still, and that its model is one of the Hub."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model
from words import random_text, save_word_tokenizer

from infini_transformers.evaluation.haystacks import repeated_sentence
from infini_transformers.evaluation.loading import load_model, load_tokenizer
from modeling_infini import InfiniForCausalLM


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_passkey


SMALL = "hidden_size=32,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,"
SMALL += "num_key_value_heads=2,head_dim=16,initializer_range=0.1"


@pytest.fixture
def train(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text(random_text(3000))

    def run(output: str, *options):
        arguments = ["--train_files", tmp_path / "book.txt", "--output_dir", tmp_path / output, "--use_cpu"]
        arguments += ["--tokens_per_step", 1024, "--lengths", 128, 512, "--release_stage", 1, "--logging_steps", 1]
        arguments += [] if "--model" in options else ["--vocab_size", 400]
        monkeypatch.setattr(sys, "argv", ["train_passkey.py", *map(str, [*arguments, *options])])
        train_passkey.main()
        return tmp_path / output

    return run


def gates_of(folder: Path) -> torch.Tensor:
    return load_model(folder).local_shares()


def test_trains_from_scratch_and_goes_on_from_a_checkpoint(train):
    scratch = ("--config_overrides", SMALL, "--max_steps", 5, "--warmup_steps", 0)
    held = train("held", *scratch, "--mastery", 0, "--release_stage", 1)
    assert torch.equal(gates_of(held), torch.full((1, 2), 0.5))
    assert load_model(held).config.segment_length == train_passkey.MODEL["segment_length"]
    state = json.loads((held / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5]

    # Three logs are mastered at any loss: the last steps train gates.
    released = train("released", *scratch, "--mastery", 1000, "--release_stage", 1)
    assert (gates_of(released) != 0.5).all()

    goes_on = ("--release_stage", 0, "--near_decoys", 0.5, "--warmup_steps", 0)
    further = train("further", "--model", released, "--max_steps", 1, *goes_on)
    assert load_tokenizer(further).get_vocab() == load_tokenizer(released).get_vocab()
    before, after = load_model(released).state_dict(), load_model(further).state_dict()
    assert before.keys() == after.keys()
    # A step of AdamW moves a weight by the learning rate at most, and its decay.
    moved = max((before[name] - after[name]).abs().max().item() for name in before)
    assert 0 < moved < 2 * train_passkey.TRAINING["learning_rate"]


@pytest.mark.parametrize("fields", [{"model": "a folder", "vocab_size": 400}, {"config_overrides": "vocab_size=400"}])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(fields):
    with pytest.raises(ValueError, match="tokenizer"):
        train_passkey.RecipeArguments(train_files=[], **fields)


def test_pressure_on_writes_starts_with_the_stage_and_ends_with_training(train, monkeypatch):
    weights, open_now = [], set()

    class Pressure:
        def __init__(self, model, weight):
            weights.append(weight)

        def __enter__(self):
            open_now.add(self)

        def __exit__(self, *error):
            open_now.discard(self)

    monkeypatch.setattr(train_passkey, "sparse_writes", Pressure)
    scratch = ("--config_overrides", SMALL, "--max_steps", 4, "--mastery", 1000)
    train("pressed", *scratch, "--release_stage", 1, "--write_sparsity", 0.25)
    assert weights == [0.25]
    assert not open_now
    train("free", *scratch, "--release_stage", 1, "--write_sparsity", 0)
    train("early", *scratch, "--release_stage", 1, "--write_sparsity", 0.5, "--max_steps", 2)
    assert weights == [0.25]


def test_pressure_on_a_model_without_write_gates_is_refused_before_training(train):
    with pytest.raises(ValueError, match="--write_sparsity 0, or add them"):
        train("refused", "--config_overrides", f"{SMALL},memory_write_gate=false", "--max_steps", 1)


@pytest.mark.parametrize(("length", "grammar_share"), [(200, 0.0), (200, 1.0), (400, 1.0)])
def test_the_whole_answer_is_labels_and_nothing_else(length, grammar_share):
    tokenizer = train_passkey.train_tokenizer([random_text(3000)], 400)
    recipe = train_passkey.RecipeArguments(
        train_files=[], lengths=[length], release_stage=0, tokens_per_step=16 * length, grammar_share=grammar_share
    )
    model = train_passkey.make_model(tokenizer, recipe)
    filler = repeated_sentence(tokenizer)
    texts = train_passkey.PasskeyTexts(
        tokenizer, [filler, filler], filler, train_passkey.Curriculum(model, recipe), seed=0
    )
    batch = next(iter(texts))
    assert batch["input_ids"].shape == batch["labels"].shape == (16, length)
    answers = []
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        asked = labels != -100
        assert torch.equal(labels[asked], ids[asked])
        prompt, answer = tokenizer.decode(ids[~asked]), tokenizer.decode(ids[asked])
        assert tokenizer.decode(ids) == prompt + answer
        space = "" if prompt[-1] == " " else " "
        number = answer.removeprefix(space).removesuffix(train_passkey.END_OF_TEXT)
        assert answer == f"{space}{number}{train_passkey.END_OF_TEXT}"
        assert len(number) == 5
        assert number.isdigit()
        assert number in prompt
        answers.append(answer)
    # Questions of the grammar also end in a space.
    assert any(answer[0].isdigit() for answer in answers) == (grammar_share > 0)


def test_passages_are_learned_between_questions_in_segments_of_the_model(train, monkeypatch):
    steps = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        steps.append(((inputs["labels"] != -100).all().item(), model.config.segment_length, inputs["labels"].shape))
        return torch.tensor(1.0 + len(steps), requires_grad=True)

    monkeypatch.setattr(train_passkey.InfiniTrainer, "training_step", training_step)
    scratch = ("--config_overrides", SMALL, "--max_steps", 20, "--mastery", 0)
    folder = train("mixed", *scratch, "--language_share", 0.5)
    passages = [step[1:] for step in steps if step[0]]
    questions = [step[1:] for step in steps if not step[0]]
    assert set(passages) == {(64, (1, 1024))}
    assert {segment_length for segment_length, _ in questions} == {32}
    assert 5 <= len(passages) <= 15
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = [entry["question_loss"] for entry in log if "question_loss" in entry]
    assert logged == [2.0 + index for index, step in enumerate(steps) if not step[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume_from_checkpoint", "last"), "--model CHECKPOINT goes on with the checkpoint's weights"),
        (("--gradient_accumulation_steps", 2), "Leave out --gradient_accumulation_steps: .* by --tokens_per_step"),
        (("--dataloader_num_workers", 1), "Leave out --dataloader_num_workers"),
        (("--per_device_train_batch_size", 2), "Leave out --per_device_train_batch_size"),
        (("--release_stage", 2), "--release_stage 2 is none of the stages of --lengths, 0 to 1"),
        (("--release_stage", -1), "--release_stage -1 is none of the stages"),
        (("--lengths", 96, 512, "--grammar_share", 0.1), "96 tokens are too short .* start --lengths at 128"),
    ],
)
def test_what_the_curriculum_would_not_go_by_is_refused_before_training(train, options, message):
    with pytest.raises(ValueError, match=message):
        train("refused", "--config_overrides", SMALL, "--max_steps", 1, *options)


def test_several_processes_are_refused():
    arguments = train_passkey.InfiniTrainingArguments("out", use_cpu=True, per_device_train_batch_size=1)
    train_passkey.refuse_options(arguments)
    arguments = SimpleNamespace(**vars(arguments), world_size=2)
    with pytest.raises(ValueError, match="would draw the same texts"):
        train_passkey.refuse_options(arguments)


def test_gates_keep_their_own_rate_from_stage_to_stage(train, monkeypatch):
    rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        gates = [group["lr"] for group in optimizer.param_groups if len(group["params"]) == 1]
        rates.append((optimizer.param_groups[0]["lr"], gates[-1]))

    monkeypatch.setattr(train_passkey.Curriculum, "on_step_begin", on_step_begin)
    options = ("--learning_rate", 1e-3, "--gate_learning_rate", 5e-2, "--lr_scheduler_type", "constant")
    options += ("--release_stage", 0, "--mastery", 1000, "--rate_decay", 0.5, "--max_steps", 6)
    train("rates", "--config_overrides", SMALL, *options)
    assert rates[0] == (1e-3, 5e-2)
    assert rates[-1] == (5e-4, 2.5e-2)
    assert {gate / rate for rate, gate in rates} == {50}


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(train):
    scratch = train("scratch", "--config_overrides", SMALL, "--max_steps", 1)
    InfiniForCausalLM.from_pretrained(scratch, dtype=torch.bfloat16).save_pretrained(scratch)
    recipe = train_passkey.RecipeArguments([], model=str(scratch))
    model = train_passkey.make_model(load_tokenizer(scratch), recipe)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_tokenizer_without_an_end_is_refused(train, tmp_path):
    tiny_model().save_pretrained(tmp_path / "endless")
    save_word_tokenizer(tmp_path / "endless")
    with pytest.raises(ValueError, match="endless has no EOS token"):
        train("refused", "--model", tmp_path / "endless", "--max_steps", 1)


@pytest.mark.parametrize("share", [-0.1, 1.0, 60])
def test_a_share_that_leaves_no_questions_is_refused_before_training(train, share):
    with pytest.raises(ValueError, match="--language_share is of all steps"):
        train("refused", "--config_overrides", SMALL, "--max_steps", 1, "--language_share", share)


def test_stray_numbers_replace_the_share_of_words():
    text = random_text(5000)
    draw = np.random.default_rng
    assert train_passkey.with_stray_numbers(text, 0.0, draw(0)) == text
    words = train_passkey.with_stray_numbers(text, 0.1, draw(0)).split()
    pairs = list(zip(words, text.split(), strict=True))
    strays = [word for word, original in pairs if word != original]
    assert 400 < len(strays) < 600
    assert all(word[0].isdigit() for word in strays)
    assert any(word.endswith("th") for word in strays)


def test_tokenizer_has_one_token_per_digit():
    tokenizer = train_passkey.train_tokenizer([random_text(3000)], 400)
    digits = "".join(map(str, np.random.default_rng(0).integers(10, size=30)))
    assert tokenizer.convert_ids_to_tokens(tokenizer(digits).input_ids) == list(digits)
    assert tokenizer.decode(tokenizer(f"The key is {digits}.").input_ids) == f"The key is {digits}."
