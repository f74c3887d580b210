"""Classification, PEFT's other adapters, TRL's DPO, streamed datasets and trackio, each with the stock tools."""

import copy
import json
import os
import sys

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_publishing import run
from tiny import MODES, VOCABULARY, random_ids, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from training import cpu_arguments, loss_by_hand, stock_trainer, text_rows
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from modeling_infini import InfiniForCausalLM
from modeling_infini.training import DocumentStreams, InfiniTrainer, InfiniTrainingArguments, collate_documents


all_modes = pytest.mark.parametrize("fields", MODES, ids=["segment", "sliding", "sinks"])


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(VOCABULARY)}, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"<{VOCABULARY - 1}>", pad_token="<0>")


def first_token_task(rows: int, seed: int) -> list[dict]:
    """Two classes of texts that differ in their first tokens alone, three to five segments before the last token."""
    generator = torch.Generator().manual_seed(seed)
    task = []
    for index in range(rows):
        label = index % 2
        length = int(torch.randint(16, 24, (1,), generator=generator))
        filler = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        task.append({"input_ids": [1 + label] * 3 + filler, "labels": label})
    return task


SCORE_ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "modeling_infini" not in sys.modules
rows = [torch.tensor([ids]) for ids in json.loads(sys.argv[2])]
print(json.dumps([model.config.id2label, [model(ids).logits[0].tolist() for ids in rows]]))
"""


def test_a_classifier_is_fine_tuned_and_loaded_without_this_package(tmp_path, tokenizer):
    torch.manual_seed(0)
    tiny_model(pad_token_id=0, head_gate_init_value=0.0).save_pretrained(tmp_path / "language-model")
    names = {"id2label": {0: "first", 1: "second"}, "label2id": {"first": 0, "second": 1}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language-model", **names)
    train, held_out = first_token_task(32, seed=0), first_token_task(16, seed=1)
    arguments = cpu_arguments(tmp_path, per_device_train_batch_size=8, learning_rate=1e-2, max_steps=60)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments, per_device_eval_batch_size=8),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.2 < before
    assert after["eval_accuracy"] == 1
    # Padded batches score each row as it is alone, elsewhere and here.
    predictions = torch.from_numpy(trainer.predict(held_out).predictions)
    trainer.save_model(tmp_path / "classifier")
    ids = json.dumps([row["input_ids"] for row in held_out])
    command = [sys.executable, "-c", SCORE_ELSEWHERE, str(tmp_path / "classifier"), ids]
    labels, found = json.loads(run(tmp_path / "elsewhere", command))
    assert labels == {"0": "first", "1": "second"}
    torch.testing.assert_close(torch.tensor(found), predictions, atol=1e-4, rtol=1e-4)


IDS = random_ids(2, 17)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


ADAPTERS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "lora-on-all-linear": {"target_modules": "all-linear"},
}


@all_modes
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_of_other_kinds_train_are_read_back_and_merged(tmp_path, fields, options):
    torch.manual_seed(0)
    defaults = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    config = LoraConfig(**{**defaults, "modules_to_save": ["head_gates"], **options})
    model, base = get_peft_model(tiny_model(**fields), config), tiny_model(**fields)
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    kinds = {"lora_A", "lora_B", "head_gates", *(["lora_magnitude_vector"] if config.use_dora else [])}
    assert all(any(kind in name for name in before) for kind in kinds)
    stock_trainer(model, text_rows(), tmp_path, max_steps=8, learning_rate=1e-2).train()
    for name, weight in model.named_parameters():
        if name in before:
            assert not torch.equal(weight, before[name]), name
    trained, shares = logits_of(model), model.local_shares()
    assert not torch.equal(shares, base.local_shares())

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(**fields), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), trained)
    assert torch.equal(loaded.local_shares(), shares)
    with loaded.disable_adapter():
        assert torch.equal(logits_of(loaded), logits_of(base))
    generated = loaded.generate(IDS, max_new_tokens=7)
    merged = loaded.merge_and_unload()
    assert set(merged.state_dict()) == set(base.state_dict())
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(IDS, max_new_tokens=7), generated)


def test_adapters_without_the_gates_leave_them_where_they_are(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    stock_trainer(model, text_rows(), tmp_path, max_steps=3, learning_rate=1e-2).train()
    assert torch.equal(model.local_shares(), tiny_model().local_shares())


def test_two_adapters_have_gates_of_their_own(tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["head_gates"])
    model = get_peft_model(tiny_model(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.set_adapter("second")
    stock_trainer(model, text_rows(), tmp_path, max_steps=3, learning_rate=1e-2).train()
    second = model.local_shares()
    model.set_adapter("first")
    assert torch.equal(model.local_shares(), tiny_model().local_shares())
    model.set_adapter("second")
    assert torch.equal(model.local_shares(), second)
    assert not torch.equal(second, tiny_model().local_shares())


def preferences() -> list[dict]:
    """Prompts of less and more than a segment, and answers of unequal lengths that end in later segments."""
    rows = []
    for index, (prompt, chosen, rejected) in enumerate([(4, 13, 7), (11, 6, 16), (7, 12, 12), (2, 21, 9)]):
        parts = zip(("prompt", "chosen", "rejected"), (prompt, chosen, rejected))
        ids = {name: (random_ids(length, seed=10 * index + len(name)) % 29 + 1) for name, length in parts}
        rows.append({name: " ".join(f"<{token}>" for token in tokens.tolist()) for name, tokens in ids.items()})
        # Tokenized by itself, an answer must not run into its prompt.
        rows[-1]["prompt"] += " "
    return rows


def log_probability(model, tokenizer, prompt: str, answer: str) -> float:
    """Of the answer and the end-of-text token after it, of this row alone, token by token."""
    prompt_ids = tokenizer(prompt).input_ids
    ids = torch.tensor([[*prompt_ids, *tokenizer(answer).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        log_probs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :].sum().item()


def dpo_trainer(model, tokenizer, folder, reference=None, peft_config=None, **arguments) -> DPOTrainer:
    options = {"per_device_train_batch_size": 4, "max_length": None, "beta": 0.3, "bf16": False, "logging_steps": 1}
    options |= {"lr_scheduler_type": "constant", **arguments}
    return DPOTrainer(
        model,
        reference,
        args=DPOConfig(**cpu_arguments(folder, **options)),
        train_dataset=datasets.Dataset.from_list(preferences()),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def by_hand(model, tokenizer, name: str) -> torch.Tensor:
    return torch.tensor([log_probability(model, tokenizer, row["prompt"], row[name]) for row in preferences()])


@all_modes
@pytest.mark.parametrize("precomputed", [False, True])
def test_dpo_compares_with_the_reference_as_by_hand(tmp_path, tokenizer, fields, precomputed):
    policy, reference = tiny_model(**fields), tiny_model(**fields, seed=1)
    # One step that changes nothing.
    options = {"precompute_ref_log_probs": precomputed, "max_steps": 1, "learning_rate": 0.0}
    trainer = dpo_trainer(policy, tokenizer, tmp_path, reference, **options)
    batch, names = next(iter(trainer.get_train_dataloader())), ("chosen", "rejected")
    if precomputed:
        found = [batch[f"ref_{name}_logps"] for name in names]
    else:
        found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    expected = {name: by_hand(reference, tokenizer, name) for name in names}
    for name, log_probs in zip(names, found):
        # The rows are shuffled.
        torch.testing.assert_close(log_probs.sort().values, expected[name].sort().values, atol=1e-3, rtol=1e-4)

    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    ratios = {name: by_hand(policy, tokenizer, name) - expected[name] for name in names}
    loss = -F.logsigmoid(0.3 * (ratios["chosen"] - ratios["rejected"])).mean().item()
    assert entry["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-4)
    for name, ratio in ratios.items():
        assert entry[f"rewards/{name}"] == pytest.approx(0.3 * ratio.mean().item(), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_dpo_learns_what_is_preferred(tmp_path, tokenizer, with_adapters):
    torch.manual_seed(0)
    # Without a reference, TRL reads the checkpoint that the model came from once more, or turns the adapters off.
    tiny_model().save_pretrained(tmp_path / "base")
    model = InfiniForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["head_gates"]) if with_adapters else None
    rate = 1e-2 if with_adapters else 2e-3
    trainer = dpo_trainer(model, tokenizer, tmp_path, None, config, max_steps=8, learning_rate=rate)
    shares = copy.deepcopy(trainer.model).local_shares()
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert entries[-1]["loss"] < 0.5
    assert entries[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert entries[-1]["rewards/margins"] > 0.3
    assert not torch.equal(trainer.model.local_shares(), shares)


@pytest.fixture
def streamed_texts(tmp_path):
    """A dataset on disk that is read as training goes; the rows of `text_rows`, without labels."""
    lines = [json.dumps({"input_ids": row["input_ids"]}) for row in text_rows()]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    return datasets.load_dataset("json", data_files=str(tmp_path / "texts.jsonl"), split="train", streaming=True)


STEPS = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 2}


@all_modes
def test_the_stock_trainer_reads_a_dataset_as_it_goes(tmp_path, streamed_texts, fields):
    assert isinstance(streamed_texts, datasets.IterableDataset)
    found, expected = tiny_model(**fields), tiny_model(**fields)
    stock_trainer(found, streamed_texts, tmp_path, collate_documents, **STEPS).train()
    # A stream is read in its own order, again from its start when it ends.
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in text_rows()]
    for step, batch in enumerate([rows[:2], rows[2:], rows[:2]]):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
        loss_by_hand(expected.train(), batch).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for (name, weight), other in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(weight, other, atol=1e-5, rtol=1e-4, msg=name)


def test_infini_trainer_carries_memories_through_a_streamed_dataset(tmp_path, streamed_texts):
    weights = []
    # An iterable gives its documents to the streams as they come; with one stream, in the order of a list.
    for documents in (streamed_texts, [row["input_ids"] for row in text_rows()]):
        streams, model = DocumentStreams(documents, 1, 6), tiny_model()
        arguments = {**STEPS, "per_device_train_batch_size": 1, "max_steps": 6, "chunk_segments": 1}
        arguments = InfiniTrainingArguments(**cpu_arguments(tmp_path, **arguments))
        InfiniTrainer(model, arguments, train_dataset=streams).train()
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    assert not torch.equal(weights[0]["lm_head.weight"], tiny_model().lm_head.weight)


TRACK = """
import json, sys
from tiny import random_ids, tiny_model
from modeling_infini.training import InfiniTrainer, InfiniTrainingArguments
rows = [{"input_ids": random_ids(23, seed=seed).tolist()} for seed in range(2)]
options = {"report_to": "trackio", "project": "tiny", "run_name": "run", "trackio_space_id": None, "logging_steps": 1}
options |= {"max_steps": 2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
model = tiny_model()
InfiniTrainer(model, InfiniTrainingArguments("out", **options), train_dataset=rows).train()
import trackio
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("tiny", "run")
names = ["local_share_mean", "local_share_min", "memory_norm", "normaliser_norm"]
found = {name: [entry[key] for entry in logs if (key := f"train/{name}/layer_1") in entry] for name in names}
histograms = sum("local_share/layer_1" in entry for entry in logs)
print("found", json.dumps([found, histograms, model.local_shares()[1].min().item()]))
"""


def test_trackio_keeps_gates_and_norms_in_its_database(tmp_path):
    variables = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = run(tmp_path / "run", [sys.executable, "-c", TRACK], **variables)
    found, histograms, smallest = json.loads(printed.split("found ")[1])
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(found, 2)
    assert found["local_share_min"][-1] == pytest.approx(smallest, rel=1e-5)
    assert min(found["memory_norm"] + found["normaliser_norm"]) > 0
    assert histograms == 2
    assert list((tmp_path / "trackio").glob("*.db"))


def test_config_and_class_are_those_of_the_language_model():
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=3))
    assert type(model).__name__ == "InfiniForSequenceClassification"
    assert set(model.state_dict()) - set(InfiniForCausalLM(tiny_config()).state_dict()) == {"score.weight"}
