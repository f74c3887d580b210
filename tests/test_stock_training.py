"""transformers.Trainer, accelerate and torch.compile train the model as they are."""

import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_publishing import run
from tiny import MODES, random_ids, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from training import (
    ONE_STEP,
    assert_weights,
    collate,
    loss_by_hand,
    stock_trainer,
    text_rows,
    weights_after_a_step_by_hand,
)
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DataCollatorWithFlattening, PreTrainedTokenizerFast

import modeling_infini.modeling_infini
from modeling_infini import InfiniForCausalLM


MODES_AND_RULES = [{**mode, "use_mem_delta_rule": delta} for mode in MODES for delta in (False, True)]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("fields", MODES_AND_RULES)
def test_accumulated_gradients_weigh_every_token_the_same(tmp_path, fields, batch_size):
    model, rows = tiny_model(**fields), text_rows()
    expected, loss = weights_after_a_step_by_hand(model, rows), loss_by_hand(model, rows).item()
    batches = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
    result = stock_trainer(model, rows, tmp_path, **ONE_STEP | batches).train()
    assert result.training_loss == pytest.approx(loss, rel=1e-5)
    assert_weights(model, expected)


@pytest.fixture
def fresh_accelerate_state():
    """accelerate keeps the precision of the last Trainer for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_accelerate_loop_accumulates_the_same_gradients(fresh_accelerate_state):
    model, rows = tiny_model(), text_rows()
    expected = weights_after_a_step_by_hand(model, rows)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1.0), loader)
    batches = list(loader)
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        with accelerator.accumulate(prepared):
            loss = prepared(**batch, num_items_in_batch=tokens, use_cache=False).loss
            accelerator.backward(loss * accelerator.gradient_accumulation_steps)
            optimizer.step()
            optimizer.zero_grad()
    assert_weights(accelerator.unwrap_model(prepared), expected)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_rows_flattened_into_one_train_as_rows_apart(tmp_path, with_lengths):
    model, rows = tiny_model(), text_rows()
    expected = weights_after_a_step_by_hand(model, rows)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=with_lengths, return_seq_idx=with_lengths)
    stock_trainer(model, rows, tmp_path, collator, **ONE_STEP).train()
    assert_weights(model, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fields", MODES_AND_RULES)
def test_gradient_checkpointing_changes_no_gradient(tmp_path, fields, use_reentrant):
    model, rows, grad_modes = tiny_model(**fields), text_rows(), []
    expected = weights_after_a_step_by_hand(model, rows)
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
    stock_trainer(model, rows, tmp_path, **ONE_STEP, **checkpointing).train()
    assert grad_modes == [not use_reentrant, True]
    assert_weights(model, expected)


def test_labels_are_smoothed_where_they_are_shifted(tmp_path):
    model, rows = tiny_model(), text_rows()
    expected = weights_after_a_step_by_hand(model, rows, smoothing=0.3)
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}
    trainer = stock_trainer(model, rows, tmp_path, label_smoothing_factor=0.3, **ONE_STEP | batches)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(model, rows, 0.3).item(), rel=1e-5)
    trainer.train()
    assert_weights(model, expected)


ELSEWHERE = """
import sys
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "modeling_infini" not in sys.modules
rows = [{"input_ids": ids, "labels": ids} for ids in [list(range(17)), list(range(30, 13, -1))]]
arguments = TrainingArguments("out", use_cpu=True, report_to="none", label_smoothing_factor=0.3)
print(Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"])
"""


def test_labels_are_smoothed_where_they_are_shifted_without_this_package(tmp_path):
    model = tiny_model()
    rows = [{"input_ids": ids, "labels": ids} for ids in [list(range(17)), list(range(30, 13, -1))]]
    model.save_pretrained(tmp_path / "saved")
    printed = run(tmp_path / "elsewhere", [sys.executable, "-c", ELSEWHERE, str(tmp_path / "saved")])
    assert float(printed.split()[-1]) == pytest.approx(loss_by_hand(model, rows, 0.3).item(), rel=1e-5)


def test_registering_the_name_of_the_class_adds_no_other_model():
    assert InfiniForCausalLM in MODEL_FOR_CAUSAL_LM_MAPPING.values()
    assert len(MODEL_FOR_CAUSAL_LM_MAPPING.keys()) == len(MODEL_FOR_CAUSAL_LM_MAPPING.values())
    assert all(isinstance(each, type | tuple) for pair in MODEL_FOR_CAUSAL_LM_MAPPING.items() for each in pair)


@pytest.mark.parametrize("fields", MODES_AND_RULES[1::2])
def test_bf16_autocast_trains_in_bfloat16_and_remembers_in_float32(tmp_path, monkeypatch, fields):
    dtypes = set()

    def read_memory(features, memory, eps):
        dtypes.update({features.dtype, memory.matrix.dtype, memory.normaliser.dtype})
        return read(features, memory, eps)

    read = modeling_infini.modeling_infini.read_memory
    monkeypatch.setattr(modeling_infini.modeling_infini, "read_memory", read_memory)
    losses, projected = {}, {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = InfiniForCausalLM(tiny_config(**fields))
        model.model.layers[1].self_attn.v_proj.register_forward_hook(
            lambda *call, bf16=bf16: projected.update({bf16: call[2].dtype})
        )
        options = {"max_steps": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "bf16": bf16}
        losses[bf16] = stock_trainer(model, text_rows(), tmp_path, **options).train().training_loss
        shares = model.local_shares()
        assert shares.isfinite().all()
        assert (shares - 0.5).abs().mean() > 0.01
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert projected == {False: torch.float32, True: torch.bfloat16}
    assert dtypes == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.01)


def test_evaluation_and_predictions_are_those_of_each_row_alone(tmp_path):
    model, rows = tiny_model(), text_rows()
    assert model.config.use_cache
    trainer = stock_trainer(model, rows, tmp_path, per_device_eval_batch_size=3)
    model.config.use_cache = True
    predictions = trainer.predict(rows)
    assert predictions.predictions.shape == (4, 17, 31)
    with torch.no_grad():
        for row, logits in zip(rows, predictions.predictions):
            alone = model(torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(torch.from_numpy(logits[: len(alone)]), alone, atol=1e-4, rtol=1e-4)
        batches = [rows[:3], rows[3:]]
        expected = sum(len(batch) * loss_by_hand(model, batch).item() for batch in batches) / len(rows)
    assert predictions.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_continues_as_if_never_interrupted(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    options |= {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup_steps": 2}
    weights = {}
    for name, checkpoint in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-3")):
        model = tiny_model(seed=len(weights), attention_dropout=0.2)
        trainer = stock_trainer(model, text_rows(), tmp_path / name, **options)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        weights[name] = model.state_dict()
    assert (tmp_path / "resumed" / "checkpoint-6").is_dir()
    for name, weight in weights["whole"].items():
        assert torch.equal(weights["resumed"][name], weight), name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_is_the_step(tmp_path, backend):
    torch._dynamo.reset()
    model, rows = tiny_model(), text_rows()
    expected = weights_after_a_step_by_hand(model, rows)
    compilation = {"torch_compile": True, "torch_compile_backend": backend}
    stock_trainer(model, rows, tmp_path, **ONE_STEP, **compilation).train()
    assert_weights(model, expected)


def test_without_padding_a_step_compiles_to_one_graph():
    torch._dynamo.reset()
    model, ids = tiny_model(**MODES_AND_RULES[-1]).train(), random_ids(2, 17)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(input_ids=ids, labels=ids, use_cache=False).loss, list(model.parameters()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def gate_logits_after_training(folder, scale: float, **arguments) -> torch.Tensor:
    torch.manual_seed(0)
    model = InfiniForCausalLM(tiny_config(head_gate_scale=scale, head_gate_init_value=2.0))
    options = {"max_steps": 30, "learning_rate": 1e-3, "per_device_train_batch_size": 4, **arguments}
    stock_trainer(model, text_rows(), folder, **options).train()
    return model.local_shares().detach().logit()


def test_gates_move_by_their_scale_at_the_stock_learning_rate(tmp_path):
    plain, default = (
        gate_logits_after_training(tmp_path, scale) - 2.0 for scale in (1.0, tiny_config().head_gate_scale)
    )
    # Adam moves a weight by at most about the learning rate a step: here at most .0155, as that falls to 0.
    assert plain.abs().max() < 0.02
    assert default.abs().mean() > 5 * plain.abs().mean()
    assert default.std() > 5 * plain.std()


def test_the_stock_trainer_decays_gates_as_it_does_other_weights(tmp_path):
    model = tiny_model()
    decayed = stock_trainer(model, text_rows(), tmp_path).get_decay_parameter_names(model)
    assert "model.layers.0.self_attn.head_gates.weight" in decayed
    free, pulled = (gate_logits_after_training(tmp_path, 10.0, weight_decay=decay) for decay in (0.0, 0.1))
    # Of a logit of about 2, the decay times the learning rates of 30 steps, whatever the scale.
    assert (free - pulled).mean().item() == pytest.approx(2.0 * 0.1 * 0.0155, rel=0.3)


@pytest.fixture
def converted_model_and_books(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    vocabulary = {f"<{index}>": index for index in range(31)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<30>").save_pretrained("converted")
    tiny_model().save_pretrained("converted")
    Path("books").mkdir()
    for seed in range(3):
        words = (f"<{index}>" for index in random_ids(150, seed=seed).tolist())
        Path(f"books/{seed}.txt").write_text(" ".join(words))


@pytest.mark.parametrize("trainer", ["Trainer", "TRL", "InfiniTrainer"])
def test_the_examples_of_the_guide_run(converted_model_and_books, trainer):
    guide = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    examples = dict(re.findall(r"#+ `?(\w+)`?\n[^#]*?```python\n(.*?)```", guide, re.DOTALL))
    scope: dict = {}
    exec(examples[trainer], scope)
    assert Path("trained").is_dir()
    exec(examples["PEFT"], scope)
    assert isinstance(InfiniForCausalLM.from_pretrained("merged"), InfiniForCausalLM)
