"""TRL's SFTTrainer: padded, padding-free and packed batches, and losses of completions alone."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import MODES, VOCABULARY, random_ids, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from training import (
    LENGTHS,
    ONE_STEP,
    assert_weights,
    cpu_arguments,
    loss_by_hand,
    text_rows,
    weights_after_a_step_by_hand,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


END = VOCABULARY - 1
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <30> {% endgeneration %}"
    "{% else %}{{ m.content }} <29> {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(VOCABULARY)}, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=f"<{END}>", pad_token="<0>", chat_template=TEMPLATE
    )


@pytest.fixture
def sft_trainer(tmp_path, tokenizer):
    def make(model, rows, peft_config=None, **arguments):
        arguments = cpu_arguments(tmp_path, bf16=False, shuffle_dataset=False, **ONE_STEP | arguments)
        return SFTTrainer(
            model,
            SFTConfig(**arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def words(ids) -> str:
    return " ".join(f"<{index}>" for index in ids)


BATCHES = {
    "padded": {"max_length": None},
    "padding-free": {"max_length": None, "padding_free": True},
    "bfd": {"max_length": 24, "packing": True},
    "bfd-split": {"max_length": 24, "packing": True, "packing_strategy": "bfd_split"},
    "bfd-padded-to-a-multiple": {"max_length": 24, "packing": True, "pad_to_multiple_of": 16},
    "bfd-accumulated": {
        "max_length": 24,
        "packing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("fields", MODES)
def test_a_step_is_that_of_each_document_alone(sft_trainer, fields, batches):
    model, rows = tiny_model(**fields), text_rows()
    expected, loss = weights_after_a_step_by_hand(model, rows), loss_by_hand(model, rows).item()
    result = sft_trainer(model, rows, **batches).train()
    assert result.training_loss == pytest.approx(loss, rel=1e-5)
    assert_weights(model, expected)


@pytest.mark.parametrize("fields", MODES)
def test_packed_documents_have_the_logits_that_they_have_alone(sft_trainer, fields):
    model, rows = tiny_model(**fields), text_rows()
    trainer = sft_trainer(model, rows, **BATCHES["bfd"])
    batch = next(iter(trainer.get_train_dataloader()))
    # What TRL hands over: no mask, position ids that restart, and what describes the documents to flash-attention.
    assert set(batch) == {
        *("input_ids", "labels", "position_ids", "seq_idx"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    documents, packed = sorted(row["input_ids"] for row in rows), []
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[0]
        for start, end in batch["cu_seq_lens_q"].unfold(0, 2, 1).tolist():
            ids = batch["input_ids"][:, start:end]
            packed.append(ids[0].tolist())
            torch.testing.assert_close(logits[start:end], model(ids).logits[0], atol=1e-4, rtol=1e-4)
    assert sorted(packed) == documents


@pytest.mark.parametrize("padding_free", [False, True])
def test_wrapped_rows_are_each_one_stream(sft_trainer, padding_free):
    model, rows = tiny_model(), text_rows()
    ids, labels = ([value for row in rows for value in row[name]] for name in ("input_ids", "labels"))
    cuts = [slice(start, start + 16) for start in range(0, len(ids), 16)]
    expected = weights_after_a_step_by_hand(model, [{"input_ids": ids[cut], "labels": labels[cut]} for cut in cuts])
    packing = {"max_length": 16, "packing": True, "packing_strategy": "wrapped", "padding_free": padding_free}
    sft_trainer(model, rows, **packing).train()
    assert_weights(model, expected)


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_completions_alone(sft_trainer, packing):
    model, rows = tiny_model(), text_rows()
    pairs = [{"prompt": words(row["input_ids"][:3]) + " ", "completion": words(row["input_ids"][3:])} for row in rows]
    for row in rows:
        ids = [*row["input_ids"], END]
        row |= {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    expected = weights_after_a_step_by_hand(model, rows)
    sft_trainer(model, pairs, packing=packing, max_length=24).train()
    assert_weights(model, expected)


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_of_what_the_assistant_says_alone(sft_trainer, packing):
    model, chats, rows = tiny_model(), [], []
    for row in text_rows():
        question, answer = row["input_ids"][:2], row["input_ids"][2:]
        turns = [{"role": "user", "content": words(question)}, {"role": "assistant", "content": words(answer)}]
        chats.append({"messages": turns})
        ids = [*question, END - 1, *answer, END]
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    expected = weights_after_a_step_by_hand(model, rows)
    sft_trainer(model, chats, packing=packing, max_length=24, assistant_only_loss=True).train()
    assert_weights(model, expected)


def test_smoothed_labels_are_shifted(sft_trainer):
    model, rows = tiny_model(), text_rows()
    expected = weights_after_a_step_by_hand(model, rows, smoothing=0.3)
    sft_trainer(model, rows, label_smoothing_factor=0.3, **BATCHES["bfd"]).train()
    assert_weights(model, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_and_gates_train_on_packed_documents(sft_trainer, use_reentrant):
    rows = text_rows()
    config = LoraConfig(
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["head_gates"],
        init_lora_weights=False,
    )
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = sft_trainer(tiny_model(), rows, config, **BATCHES["bfd"], **options)
    expected = weights_after_a_step_by_hand(trainer.model, rows)
    trainer.train()
    assert sum("head_gates" in name for name in expected) == 2
    assert_weights(trainer.model, expected)


def test_evaluation(sft_trainer):
    model, rows = tiny_model(), text_rows()
    trainer = sft_trainer(model, rows, per_device_eval_batch_size=4, **BATCHES["bfd"])
    metrics = trainer.evaluate(Dataset.from_list(rows))
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(model, rows).item(), rel=1e-5)


def test_a_checkpoint_loads_as_any_other(sft_trainer, tmp_path):
    model = tiny_model()
    trainer = sft_trainer(model, text_rows(), save_strategy="steps", save_steps=1, **BATCHES["bfd"])
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert_weights(loaded, dict(model.named_parameters()), tolerance=0)
    assert torch.equal(
        loaded.generate(random_ids(2, 7), max_new_tokens=9), model.eval().generate(random_ids(2, 7), max_new_tokens=9)
    )
