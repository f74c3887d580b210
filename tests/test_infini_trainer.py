"""`InfiniTrainer`: the stock Trainer's results in chunks, streams over steps, gates, logs and what it refuses."""

import copy
import json
import math
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from tiny import MODES, random_ids, relative_error, tiny_config, tiny_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from modeling_infini import InfiniForCausalLM, InfiniForSequenceClassification
from modeling_infini.training import (
    DocumentStreams,
    InfiniTrainer,
    InfiniTrainingArguments,
    collate_documents,
    last_whole_checkpoint,
    record_run,
)
from modeling_infini.training.trainer import state_norms


COMMON = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def documents(*lengths: int) -> list[dict]:
    return [{"input_ids": random_ids(length, seed=index).tolist()} for index, length in enumerate(lengths)]


def infini_trainer(model, folder, dataset=None, eval_dataset=None, **arguments) -> InfiniTrainer:
    return InfiniTrainer(
        model,
        InfiniTrainingArguments(str(folder), **{**COMMON, **arguments}),
        train_dataset=dataset,
        eval_dataset=eval_dataset,
    )


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_weights(found, expected, bound: float = 2e-5):
    for name, weight in weights_of(expected).items():
        assert relative_error(weights_of(found)[name], weight) <= bound, name


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        (MODES[0], {"chunk_segments": 1}),
        (MODES[2], {"chunk_segments": 2}),
        (MODES[1], {}),
        (MODES[1], {"chunk_segments": 1, "gradient_checkpointing": True}),
        (MODES[0], {"chunk_segments": 1, "gradient_accumulation_steps": 3}),
        (MODES[2], {"chunk_segments": 1, "label_smoothing_factor": 0.2}),
    ],
)
def test_chunks_train_as_the_stock_trainer_does(tmp_path, fields, arguments):
    dataset = datasets.Dataset.from_list(documents(23, 5, 11, 16, 30, 2, 9, 14, 21, 8))
    ours, stock = tiny_model(**fields), tiny_model(**fields)
    shared = {name: value for name, value in arguments.items() if name != "chunk_segments"}
    found = infini_trainer(ours, tmp_path, dataset, **arguments)
    expected = Trainer(
        stock,
        TrainingArguments(str(tmp_path), **COMMON, **shared),
        train_dataset=dataset,
        data_collator=collate_documents,
    )
    found.train()
    expected.train()
    torch.testing.assert_close(losses(found), losses(expected), rtol=1e-5, atol=1e-6)
    # Adam magnifies the rounding of gradients near 0.
    assert_same_weights(ours, stock, 1e-3)


def train_streams_by_hand(model, streams: DocumentStreams, accumulation: int) -> list[float]:
    """SGD over the rows of `streams`, the cache carried from batch to batch and cut off in between."""
    rows, cache, values = list(streams), None, []
    batches = [
        {name: torch.stack([row[name] for row in rows[start : start + 2]]) for name in rows[0]}
        for start in range(0, len(rows), 2)
    ]
    for start in range(0, len(batches), accumulation):
        step = batches[start : start + accumulation]
        count = sum((batch["shift_labels"] != -100).sum() for batch in step)
        values.append(0.0)
        for batch in step:
            targets = batch.pop("shift_labels")
            del batch["labels"]
            outputs = model(**batch, past_key_values=cache, use_cache=True)
            loss = cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), reduction="sum") / count
            loss.backward()
            cache = outputs.past_key_values.detached()
            values[-1] += loss.item()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
        model.zero_grad()
    return values


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("fields", MODES)
def test_streams_carry_their_memory_from_step_to_step(tmp_path, fields, accumulation):
    streams = DocumentStreams(documents(40, 7, 23, 31, 12), 2, 8)
    ours, expected = tiny_model(**fields), tiny_model(**fields)
    options = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "chunk_segments": 1}
    options |= {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    trainer = infini_trainer(ours, tmp_path, streams, **options)
    trainer.train()
    values = train_streams_by_hand(expected.train(), streams, accumulation)
    torch.testing.assert_close(losses(trainer), values, rtol=1e-4, atol=1e-5)
    assert_same_weights(ours, expected, 1e-4)


def test_evaluation_is_the_mean_over_tokens_and_leaves_training_alone(tmp_path):
    train = DocumentStreams(documents(60, 45), 2, 8)
    held_out = DocumentStreams(documents(33, 14), 2, 8)
    options = {"optim": "sgd", "max_grad_norm": 0.0, "chunk_segments": 1}
    evaluated, expected = tiny_model(), tiny_model()
    trainer = infini_trainer(evaluated, tmp_path, train, held_out, eval_strategy="steps", eval_steps=2, **options)
    trainer.train()
    infini_trainer(expected, tmp_path, train, **options).train()
    assert_same_weights(evaluated, expected, 0)

    total, count = 0.0, 0
    evaluated.eval()
    for document in documents(33, 14):
        ids = torch.tensor([document["input_ids"]])
        with torch.no_grad():
            total += cross_entropy(evaluated(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert math.isclose(trainer.evaluate()["eval_loss"], total / count, rel_tol=1e-5)
    assert math.isclose(last, total / count, rel_tol=0.5)
    whole = infini_trainer(evaluated, tmp_path, eval_dataset=documents(33, 14), chunk_segments=1)
    assert math.isclose(whole.evaluate()["eval_loss"], total / count, rel_tol=1e-5)


def test_predictions_are_the_logits_of_the_whole_sequence(tmp_path):
    model = tiny_model().eval()
    dataset = documents(23, 23)
    output = infini_trainer(model, tmp_path, chunk_segments=1).predict(dataset)
    expected = model(collate_documents(dataset)["input_ids"]).logits.detach()
    assert relative_error(torch.from_numpy(output.predictions), expected) < 1e-5
    assert (output.label_ids == collate_documents(dataset)["labels"].numpy()).all()


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    def trainer(folder, model):
        streams = DocumentStreams(documents(60, 45, 33, 20), 2, 8, seed=4)
        options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
        return infini_trainer(model, folder, streams, chunk_segments=1, **options)

    whole, resumed = tiny_model(attention_dropout=0.1), tiny_model(attention_dropout=0.1)
    trainer(tmp_path / "whole", whole).train()
    for step in (3, 9):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert (checkpoint / "memory-of-streams-0" / "infini_cache.safetensors").is_file()
        trainer(tmp_path / "resumed", resumed).train(resume_from_checkpoint=str(checkpoint))
        assert_same_weights(resumed, whole, 0)


class FakeHub:
    """Of the Hub's API, what the Trainer calls; `uploads` are the files that were there when it was told to push."""

    def __init__(self):
        self.uploads: list[tuple[str, set[str]]] = []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"reader/{name}")

    def upload_folder(self, folder_path, path_in_repo="", ignore_patterns=None, **kwargs):
        files = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        self.uploads.append((path_in_repo, set(filter_repo_objects(files, ignore_patterns=ignore_patterns))))
        done = Future()
        done.set_result(None)
        return done


CODE = {"modeling_infini.py", "configuration_infini.py", "cache.py", "streams.py"}


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
@pytest.mark.parametrize("trainer_class", [Trainer, InfiniTrainer])
def test_everything_of_a_checkpoint_is_there_when_it_is_published(tmp_path, monkeypatch, trainer_class, strategy):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 4, "push_to_hub": True}
    is_ours = trainer_class is InfiniTrainer
    trainer = trainer_class(
        tiny_model(),
        InfiniTrainingArguments(str(tmp_path / "run"), **{**COMMON, **options, "hub_strategy": strategy}),
        train_dataset=DocumentStreams(documents(60, 45), 2, 8) if is_ours else documents(20, 20),
        data_collator=collate_documents,
    )
    trainer.train()
    whole = {"config.json", "model.safetensors", *CODE}
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    state |= {"memory-of-streams-0/infini_cache.safetensors"} if is_ours else set()
    folders = {
        "every_save": [],
        "checkpoint": ["last-checkpoint"] * 2,
        "all_checkpoints": ["checkpoint-2", "checkpoint-4"],
    }
    assert [place for place, _ in hub.uploads if place] == folders[strategy]
    assert len([place for place, _ in hub.uploads if not place]) == 2
    for place, files in hub.uploads:
        assert files >= (whole | state if place else whole)
        assert not any("_unfinished" in file or file.startswith("checkpoint-") for file in files)
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"checkpoint-4"}


def test_a_checkpoint_has_no_name_before_it_is_whole(tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 6}

    def trainer():
        return infini_trainer(tiny_model(), tmp_path, DocumentStreams(documents(60, 45), 2, 8), **options)

    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    for broken in ("torch.save", "modeling_infini.cache.InfiniCache.save_pretrained"):
        stopped = trainer()
        with monkeypatch.context() as patch:
            patch.setattr(broken, fails)
            with pytest.raises(OSError, match="No space"):
                stopped.train()
        assert get_last_checkpoint(tmp_path) is None
    trainer().train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    # The same step again, as of another run in the same folder.
    before = (tmp_path / "checkpoint-6" / "trainer_state.json").stat().st_mtime_ns
    trainer().train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").stat().st_mtime_ns > before


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_is_known_and_kept(tmp_path, limit):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": limit, "max_steps": 4}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.5}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = infini_trainer(tiny_model(), tmp_path, documents(20, 20), documents(20, 20), **options)
    trainer.train()
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = tmp_path / f"checkpoint-{max(evaluated, key=evaluated.get)}"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluated.values()))
    kept = {best} if limit == 1 else {best, tmp_path / "checkpoint-4"}
    assert {path for path in tmp_path.iterdir() if path.is_dir()} >= kept
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == limit


@pytest.mark.parametrize("directory", [".", "elsewhere"])
def test_the_best_checkpoint_is_kept_if_the_folder_is_spelled_otherwise(tmp_path, monkeypatch, directory):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "learning_rate": 0.5}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    texts = documents(20, 20), documents(20, 20)
    first = infini_trainer(tiny_model(), "out", *texts, max_steps=2, **options)
    first.train()
    # No evaluation to come is a better one.
    state = Path(last_whole_checkpoint("out")) / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best_metric": 1e9}))
    best = Path(json.loads(state.read_text())["best_model_checkpoint"]).resolve()
    monkeypatch.chdir(directory)
    resumed = infini_trainer(tiny_model(), tmp_path / "out", *texts, max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert best.is_dir()
    assert Path(resumed.state.best_model_checkpoint).resolve() == best


def test_training_goes_on_from_the_last_checkpoint_that_is_whole(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for name, state in (
        ("2", '{"global_step": 2}'),
        ("10", '{"global_st'),
        ("11", None),
        ("best", '{"global_step": 2}'),
    ):
        (tmp_path / f"checkpoint-{name}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    options = {"save_strategy": "steps", "save_steps": 2}
    infini_trainer(tiny_model(), tmp_path, documents(20, 20), max_steps=2, **options).train()
    resumed = infini_trainer(tiny_model(), tmp_path, documents(20, 20), max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").is_file()
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_a_run_goes_on_with_what_it_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    asked = {"train_files": ["books", "an/id"], "model": None, "seed": 0}
    record_run("out", asked, places=["train_files", "model"])
    # Spelled otherwise, it is the same folder; from elsewhere, the checkpoint's own run counts.
    again = {**asked, "train_files": [str(tmp_path / "books"), "an/id"]}
    record_run("out", again, "out/checkpoint-1", places=["train_files", "model"])
    record_run("further", again, tmp_path / "out/checkpoint-1", places=["train_files", "model"])
    with pytest.raises(ValueError, match=r"The run of out/checkpoint-1 was .* other arguments \(train_files, seed\)"):
        record_run("further", {**asked, "train_files": ["books"], "seed": 1}, "out/checkpoint-1")
    # What nothing is known of is believed, and what starts anew is written down anew.
    record_run("further", {"seed": 1}, "unknown/checkpoint-1")
    record_run("out", {"seed": 1})
    record_run("out", {"seed": 1}, "out/checkpoint-1")


def test_truncation_is_passed_on(tmp_path):
    dataset = documents(20, 20)
    whole, truncated = tiny_model(), tiny_model()
    infini_trainer(whole, tmp_path, dataset).train()
    infini_trainer(truncated, tmp_path, dataset, detach_every_num_segments=1).train()
    with pytest.raises(AssertionError):
        assert_same_weights(truncated, whole)


def gates(model) -> torch.Tensor:
    return torch.stack([w.detach().clone() for n, w in model.named_parameters() if "head_gates." in n])


def test_gates_have_a_learning_rate_of_their_own_and_no_decay(tmp_path):
    moves = {}
    for rate in (1e-2, 1e-3):
        model = tiny_model()
        before = gates(model)
        trainer = infini_trainer(
            model, tmp_path, documents(20, 20), gate_learning_rate=rate, weight_decay=0.5, max_steps=1
        )
        trainer.train()
        moves[rate] = (gates(model) - before).abs()
        groups = [group for group in trainer.optimizer.param_groups if group["initial_lr"] == rate]
        assert [parameter.numel() for parameter in groups[-1]["params"]] == [4, 4]
        assert groups[-1]["weight_decay"] == 0
    # Adam's first step is the learning rate, whatever the gradient.
    for rate, move in moves.items():
        torch.testing.assert_close(move, torch.full_like(move, rate), rtol=1e-2, atol=0)


def test_gates_stand_still_while_they_are_frozen(tmp_path):
    model = tiny_model()
    before = weights_of(model)
    trainer = infini_trainer(model, tmp_path, documents(20, 20), gate_frozen_steps=2, weight_decay=0.1, max_steps=2)
    trainer.train()
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]) == ("head_gates" in name), name
    released = infini_trainer(tiny_model(), tmp_path, documents(20, 20), gate_frozen_steps=2, max_steps=3)
    released.train()
    assert not torch.equal(gates(released.model), gates(tiny_model()))


def test_lora_with_gates_trains_in_chunks(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], modules_to_save=["head_gates"])
    model = get_peft_model(tiny_model(), lora)
    before = copy.deepcopy(weights_of(model))
    trainer = infini_trainer(model, tmp_path, documents(20, 20), chunk_segments=1, gate_learning_rate=0.5)
    trainer.train()
    moved = {name for name, weight in weights_of(model).items() if not torch.equal(weight, before[name])}
    assert all("lora_" in name or "head_gates.modules_to_save" in name for name in moved)
    assert len([name for name in moved if "head_gates" in name]) == 2
    trained = torch.stack([w for n, w in weights_of(model).items() if "head_gates.modules_to_save" in n])
    shares = torch.sigmoid(model.config.head_gate_scale * trained)
    entry = next(e for e in reversed(trainer.state.log_history) if "loss" in e)
    assert math.isclose(entry["local_share_max"], shares.max().item(), rel_tol=1e-5)


def test_logs_say_what_the_memory_does(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model()
    trainer = infini_trainer(model, tmp_path, documents(23, 20), report_to="tensorboard", max_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    shares = model.local_shares()
    assert math.isclose(entries[-1]["local_share_mean"], shares.mean().item(), rel_tol=1e-6)
    assert entries[-1]["memory_norm_max"] > 0
    assert entries[-1]["tokens_per_second"] > 0
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    tags = events.Tags()
    for layer in range(2):
        assert f"local_share/layer_{layer}" in tags["histograms"]
        for name in ("local_share_mean", "local_share_min", "local_share_max", "memory_norm", "normaliser_norm"):
            assert f"train/{name}/layer_{layer}" in tags["scalars"]
    last = events.Scalars("train/local_share_min/layer_1")[-1]
    assert (last.step, last.value) == (2, pytest.approx(shares[1].min().item()))


@pytest.mark.parametrize("memory_layers", [[1], []])
def test_layers_without_gates_are_not_in_the_logs_of_gates(tmp_path, memory_layers):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model(memory_layers=memory_layers)
    trainer = infini_trainer(model, tmp_path, documents(23, 20), report_to="tensorboard", max_steps=1)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    if memory_layers:
        shares = model.local_shares()[1]
        assert math.isclose(entry["local_share_mean"], shares.mean().item(), rel_tol=1e-6)
        assert math.isclose(entry["local_share_max"], shares.max().item(), rel_tol=1e-6)
    else:
        assert not [name for name in entry if name.startswith("local_share")]
    histograms = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload().Tags()["histograms"]
    assert histograms == [f"local_share/layer_{layer}" for layer in memory_layers]


def test_trackio_gets_the_gates_too(tmp_path, monkeypatch):
    import trackio

    logged = []
    monkeypatch.setattr(trackio, "init", lambda *args, **kwargs: type("Run", (), {"config": {}})())
    monkeypatch.setattr(trackio, "log", lambda entry, **kwargs: logged.append(entry))
    monkeypatch.setattr(trackio, "finish", lambda: None)
    infini_trainer(tiny_model(), tmp_path, documents(23, 20), report_to="trackio", max_steps=1).train()
    names = {name for entry in logged for name in entry}
    assert "train/local_share_mean/layer_1" in names
    assert isinstance(next(e for e in logged if "local_share/layer_1" in e)["local_share/layer_1"], trackio.Histogram)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_memory_stops_training_and_names_the_layer(tmp_path, value):
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = value
    with pytest.raises(FloatingPointError, match=r"memory of model\.layers\.1\.self_attn is (nan|-?inf)"):
        infini_trainer(model, tmp_path, documents(23, 20)).train()


def test_norms_are_those_of_the_largest_head():
    cache = tiny_model()(random_ids(2, 11), use_cache=True).past_key_values.detached()
    norms = state_norms(cache)
    for index, layer in enumerate(cache.layers):
        expected = max(layer.memory[row, head].norm().item() for row in range(2) for head in range(2))
        assert math.isclose(norms["memory"][index], expected, rel_tol=1e-6)


def test_bf16_trains(tmp_path):
    trainer = infini_trainer(tiny_model(), tmp_path, documents(23, 20), bf16=True, chunk_segments=1, max_steps=3)
    trainer.train()
    assert all(math.isfinite(value) for value in losses(trainer))


def test_other_heads_train_as_by_the_stock_trainer(tmp_path):
    torch.manual_seed(0)
    dataset = [{"input_ids": random_ids(12, seed=seed), "labels": seed % 2} for seed in range(8)]
    config = tiny_config(num_labels=2, pad_token_id=0)
    ours = InfiniForSequenceClassification(config)
    stock = copy.deepcopy(ours)
    InfiniTrainer(ours, InfiniTrainingArguments(str(tmp_path), **COMMON), train_dataset=dataset).train()
    Trainer(stock, TrainingArguments(str(tmp_path), **COMMON), train_dataset=dataset).train()
    assert_same_weights(ours, stock, 1e-6)
    with pytest.raises(ValueError, match="causal language models"):
        InfiniTrainer(ours, InfiniTrainingArguments(str(tmp_path), **COMMON, chunk_segments=1), train_dataset=dataset)


def test_context_parallelism_without_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(InfiniTrainer, "get_cp_size", lambda self: 2)
    with pytest.raises(ValueError, match=r"wrong for this model. Use modeling_infini\.training\.ContextParallel"):
        infini_trainer(tiny_model(), tmp_path, documents(20, 20))


def test_what_cannot_be_done_is_refused(tmp_path):
    model = InfiniForCausalLM(tiny_config())
    with pytest.raises(TypeError, match="InfiniTrainingArguments"):
        InfiniTrainer(model, TrainingArguments(str(tmp_path), **COMMON))
    with pytest.raises(ValueError, match="chunk_segments=0"):
        InfiniTrainingArguments(str(tmp_path), chunk_segments=0)
    with pytest.raises(ValueError, match="gate_frozen_steps=-1"):
        InfiniTrainingArguments(str(tmp_path), gate_frozen_steps=-1)
    streams = DocumentStreams(documents(20, 20, 20), 3, 5)
    with pytest.raises(ValueError, match="1 processes with batches of 2 read 2 streams"):
        infini_trainer(model, tmp_path, streams).train()
    with pytest.raises(ValueError, match="num_streams=3"):
        infini_trainer(model, tmp_path, eval_dataset=streams).evaluate()
    with pytest.raises(ValueError, match="split_batches change how many streams"):
        infini_trainer(model, tmp_path, DocumentStreams(documents(20, 20), 2, 5), auto_find_batch_size=True)
    with pytest.raises(ValueError, match="set it in your own"):
        InfiniTrainer(
            model,
            InfiniTrainingArguments(str(tmp_path), **COMMON, gate_learning_rate=0.1),
            optimizers=(torch.optim.SGD(model.parameters(), 0.1), None),
        )
    with pytest.raises(ValueError, match="compute_loss_func"):
        InfiniTrainer(
            model,
            InfiniTrainingArguments(str(tmp_path), **COMMON, chunk_segments=1),
            compute_loss_func=mean_loss,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "lomo"}, 'optim="lomo" changes weights in the midst of a backward'),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]}, "layerwise"),
        ({"use_liger_kernel": True}, "Liger has no kernels for this model"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "in their first epoch"),
    ],
)
def test_options_that_would_be_ignored_or_wrong_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        infini_trainer(tiny_model(), tmp_path, DocumentStreams(documents(20, 20), 2, 5), **arguments)


def test_options_of_gates_that_are_not_trained_are_refused(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    infini_trainer(model, tmp_path)
    for name, value in (("gate_learning_rate", 0.1), ("gate_frozen_steps", 2), ("gate_weight_decay", 0.1)):
        with pytest.raises(ValueError, match=f"Nothing can come of {name}: no head gates are trained"):
            infini_trainer(model, tmp_path, **{name: value})
    with pytest.raises(ValueError, match="no layer of this model has a memory"):
        infini_trainer(tiny_model(memory_layers=[]), tmp_path, gate_learning_rate=0.1)


class LossThatIsAMean(InfiniTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = mean_loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class LossThatIsASum(InfiniTrainer):
    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        targets = inputs.pop("shift_labels")
        outputs = model(**{name: states for name, states in inputs.items() if name != "labels"})
        loss = cross_entropy(outputs.logits.flatten(0, 1), targets.flatten(), reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def test_a_loss_of_ones_own_is_not_cut_into_chunks_unless_it_is_a_sum(tmp_path):
    own = tiny_model()
    own.loss_function = lambda logits, labels, vocab_size, **kwargs: mean_loss(SimpleNamespace(logits=logits), labels)
    for trainer_class, model in ((LossThatIsAMean, tiny_model()), (InfiniTrainer, own)):
        arguments = InfiniTrainingArguments(str(tmp_path), **COMMON, chunk_segments=1)
        with pytest.raises(ValueError, match="loss_is_scaled_for_ga=True"):
            trainer_class(model, arguments)
        arguments = InfiniTrainingArguments(str(tmp_path), **COMMON)
        trainer = trainer_class(model, arguments, eval_dataset=documents(20, 11))
        batch = collate_documents(documents(20, 11))
        expected = mean_loss(model(batch["input_ids"], attention_mask=batch["attention_mask"]), batch["labels"])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item())
        with pytest.raises(ValueError, match="chunks and streams never make"):
            trainer.evaluate(DocumentStreams(documents(20, 20), 2, 5))
    dataset = documents(20, 11, 17, 20)
    models = [tiny_model(), tiny_model()]
    for trainer_class, model in zip((InfiniTrainer, LossThatIsASum), models):
        arguments = InfiniTrainingArguments(str(tmp_path), **COMMON, chunk_segments=1)
        trainer = trainer_class(model, arguments, train_dataset=dataset, eval_dataset=dataset)
        trainer.train()
        model.loss = trainer.evaluate()["eval_loss"]
    assert_same_weights(models[1], models[0])
    assert models[1].loss == pytest.approx(models[0].loss)


def test_what_is_set_after_the_trainer_was_made_is_checked_too(tmp_path):
    streams = DocumentStreams(documents(20, 20), 2, 5)
    trainer = infini_trainer(tiny_model(), tmp_path, documents(20, 20), max_steps=1)
    trainer.train_dataset, trainer.args.use_liger_kernel = streams, True
    with pytest.raises(ValueError, match="use_liger_kernel"):
        trainer.train()
    trainer = infini_trainer(tiny_model(), tmp_path, documents(20, 20), chunk_segments=1, max_steps=1)
    trainer.compute_loss_func = mean_loss
    for run in (trainer.train, lambda: trainer.evaluate(documents(20, 20))):
        with pytest.raises(ValueError, match="which chunks and streams never make"):
            run()
    trainer = infini_trainer(tiny_model(), tmp_path, gate_learning_rate=0.1, max_steps=1, dataloader_num_workers=1)
    trainer.train_dataset = documents(20, 20)
    trainer.train()
    trainer.train()
    trainer.args.dataloader_persistent_workers = True
    with pytest.raises(ValueError, match="in their first epoch"):
        trainer.evaluate(streams)


@pytest.mark.parametrize("name", ["gate_learning_rate", "gate_weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, "5e-3"])
def test_rates_that_are_no_rates_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a number"):
        InfiniTrainingArguments(str(tmp_path), **{name: value})


def test_gates_learn_at_the_rate_of_everything_else_unless_told(tmp_path):
    model = tiny_model()
    trainer = InfiniTrainer(
        model,
        InfiniTrainingArguments(str(tmp_path), **COMMON, max_steps=1),
        train_dataset=documents(20, 20),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
    )
    trainer.train()
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.5}


def test_nan_in_the_loss_stops_training_before_it_reaches_the_weights(tmp_path):
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = math.nan
    before = weights_of(model)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        infini_trainer(model, tmp_path, documents(23, 20), max_steps=1).train()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0, equal_nan=True)


def test_an_evaluation_without_a_target_has_no_loss(tmp_path):
    masked = [{**row, "labels": [-100] * 20} for row in documents(20, 20)]
    assert "eval_loss" not in infini_trainer(tiny_model(), tmp_path).evaluate(masked)
    assert infini_trainer(tiny_model(), tmp_path).predict(masked).predictions.shape[:2] == (2, 20)


def test_evaluation_goes_in_the_chunks_of_training(tmp_path):
    model, lengths = tiny_model(), []
    model.register_forward_pre_hook(lambda _, __, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True)
    infini_trainer(model, tmp_path, detach_every_num_segments=2).evaluate(documents(40, 40))
    assert max(lengths) == 10


def test_the_optimizer_of_another_trainer_is_refused_in_a_sentence(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), **{**COMMON, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    )
    Trainer(tiny_model(), arguments, train_dataset=documents(20, 20), data_collator=collate_documents).train()
    with pytest.raises(ValueError, match="checkpoint-1 was not written by an InfiniTrainer that trains the same"):
        infini_trainer(tiny_model(), tmp_path, documents(20, 20), max_steps=2).train(str(tmp_path / "checkpoint-1"))


def test_columns_of_numbers_that_nothing_reads_are_refused(tmp_path):
    rows = [{**row, "text": "a", "completion_mask": [1] * 20, "length": 20} for row in documents(20, 20)]
    for dataset in (rows, datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        with pytest.raises(ValueError, match="Nothing reads these columns of the documents: completion_mask"):
            infini_trainer(tiny_model(), tmp_path, dataset, max_steps=1).train()
        with pytest.raises(ValueError, match="completion_mask"):
            infini_trainer(tiny_model(), tmp_path).evaluate(dataset)
    with pytest.raises(ValueError, match="completion_mask"):
        # Before any step is made.
        infini_trainer(tiny_model(), tmp_path, documents(20, 20), {"held_out": rows})

    def keep_all(features):
        return {
            **collate_documents([{"input_ids": row["input_ids"]} for row in features]),
            "weights": torch.ones(2, 20),
        }

    trainer = infini_trainer(tiny_model(), tmp_path, rows, max_steps=1, remove_unused_columns=False)
    trainer.data_collator = keep_all
    with pytest.raises(ValueError, match="The model does not read weights"):
        trainer.train()
    of_tokenizers = {"token_type_ids": [0] * 20, "special_tokens_mask": [0] * 20, "length": 20}
    neutral = [{**row, "text": "a", "id": 7, "score": 0.5, **of_tokenizers} for row in documents(20, 20)]
    infini_trainer(tiny_model(), tmp_path, datasets.Dataset.from_list(neutral), max_steps=1).train()


def test_a_step_without_a_target_changes_nothing(tmp_path):
    masked = [{**row, "labels": [-100] * 40} for row in documents(40, 40)]
    for dataset in (masked, DocumentStreams(masked, 2, 8)):
        model = tiny_model()
        before = weights_of(model)
        trainer = infini_trainer(model, tmp_path, dataset, max_steps=2)
        trainer.train()
        assert losses(trainer) == [0, 0]
        assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_targets_that_come_shifted_alone_count_over_all_batches_of_a_step(tmp_path):
    def shifted(features):
        batch = collate_documents(features)
        labels = batch.pop("labels")
        return {**batch, "shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}

    models = []
    for collate in (collate_documents, shifted):
        models.append(tiny_model())
        trainer = infini_trainer(
            models[-1],
            tmp_path,
            documents(30, 5, 9, 17),
            documents(20, 11),
            gradient_accumulation_steps=2,
            max_steps=2,
        )
        trainer.data_collator = collate
        trainer.train()
        models[-1].loss = trainer.evaluate()["eval_loss"]
    assert_same_weights(models[1], models[0], 1e-6)
    assert models[1].loss == pytest.approx(models[0].loss)


@pytest.mark.parametrize("chunk_segments", [None, 1])
def test_padding_on_the_left_trains_as_on_the_right(tmp_path, chunk_segments):
    def pad_left(features):
        batch = collate_documents(features)
        counts = batch["attention_mask"].sum(1)
        return {
            name: torch.stack([row.roll(int(len(row) - count)) for row, count in zip(states, counts)])
            for name, states in batch.items()
        }

    models = []
    for collate in (collate_documents, pad_left):
        models.append(tiny_model())
        trainer = infini_trainer(
            models[-1], tmp_path, documents(20, 9), documents(13, 4), chunk_segments=chunk_segments, max_steps=1
        )
        trainer.data_collator = collate
        trainer.train()
        models[-1].loss = trainer.evaluate()["eval_loss"]
    assert_same_weights(models[1], models[0], 1e-3)
    assert models[1].loss == pytest.approx(models[0].loss, rel=1e-4)


def test_streams_that_do_not_go_on_where_the_memory_stopped_are_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    infini_trainer(tiny_model(), tmp_path, DocumentStreams(documents(60, 45), 2, 8), max_steps=3, **options).train()

    def resume(streams, **arguments):
        trainer = infini_trainer(tiny_model(), tmp_path, streams, max_steps=4, **arguments)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    resume(DocumentStreams(documents(60, 45), 2, 8))
    for streams in (
        DocumentStreams(documents(45, 60), 2, 8),
        DocumentStreams(documents(60, 45), 2, 8, seed=1),
        DocumentStreams(documents(60, 45), 2, 5),
    ):
        with pytest.raises(ValueError, match="other documents, or in another order"):
            resume(streams)
    with pytest.raises(ValueError, match=r"has read \[24, 24\] tokens .* go on at \[48, 0\]"):
        resume(DocumentStreams(documents(60, 45), 2, 8), gradient_accumulation_steps=2)
    # Documents that are read as training goes are known by their places alone.
    with pytest.raises(ValueError, match=r"has read \[24, 24\] tokens .* go on at \[15, 15\]"):
        resume(DocumentStreams(iter(documents(60, 45)), 2, 5))
    with pytest.raises(ValueError, match=r"has read \[24, 24\] tokens .* go on at \[24, 24, 24, 24\]"):
        resume(DocumentStreams(iter(documents(60, 45, 60, 45)), 4, 8), per_device_train_batch_size=4)
    shutil.rmtree(tmp_path / "checkpoint-3" / "memory-of-streams-0")
    with pytest.raises(FileNotFoundError, match="checkpoint-3 has no memory-of-streams-0"):
        resume(DocumentStreams(documents(60, 45), 2, 8))

    trainer = infini_trainer(tiny_model(), tmp_path, DocumentStreams(documents(60, 45), 2, 8), max_steps=1)
    trainer.data_collator = lambda rows: {
        name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")
    }
    with pytest.raises(ValueError, match="leave data_collator out"):
        trainer.train()


def warned_of_lost_starts(run) -> bool:
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_infini.streams.logger.warning_once", said.append, raising=False)
        run()
    return any("the starts of these are lost" in message for message in said)


def test_streams_are_refused_or_warned_of_where_nothing_carries_their_memory(tmp_path):
    config = tiny_config(num_labels=2, pad_token_id=0)
    trainer = InfiniTrainer(InfiniForSequenceClassification(config), InfiniTrainingArguments(str(tmp_path), **COMMON))
    with pytest.raises(ValueError, match="nothing else carries a memory"):
        trainer.evaluate(DocumentStreams(documents(20, 20), 2, 5))

    streams = DocumentStreams(documents(20, 20), 2, 5)
    wrapped = infini_trainer(tiny_model(), tmp_path, torch.utils.data.ChainDataset([streams]), max_steps=3)
    arguments = TrainingArguments(str(tmp_path), **COMMON, max_steps=3)
    stock = Trainer(tiny_model(), arguments, train_dataset=streams, data_collator=collate_documents)
    for trainer in (wrapped, stock):
        assert warned_of_lost_starts(trainer.train)
        assert warned_of_lost_starts(
            lambda trainer=trainer: trainer.evaluate(torch.utils.data.ChainDataset([streams]))
        )
    assert not warned_of_lost_starts(infini_trainer(tiny_model(), tmp_path, streams, max_steps=3).train)


def mean_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_loss_of_ones_own_is_used_as_by_the_stock_trainer(tmp_path):
    ours, stock = tiny_model(), tiny_model()
    dataset = documents(20, 11, 20, 7)
    options = {**COMMON, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    found = InfiniTrainer(
        ours,
        InfiniTrainingArguments(str(tmp_path), **options),
        train_dataset=dataset,
        eval_dataset=dataset,
        compute_loss_func=mean_loss,
    )
    expected = Trainer(
        stock,
        TrainingArguments(str(tmp_path), **options),
        data_collator=collate_documents,
        train_dataset=dataset,
        eval_dataset=dataset,
        compute_loss_func=mean_loss,
    )
    found.train()
    expected.train()
    assert_same_weights(ours, stock, 1e-6)
    assert found.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"])


def test_layers_without_memory_are_logged_as_such(tmp_path):
    trainer = infini_trainer(tiny_model(memory_layers=[1]), tmp_path, documents(20, 20), max_steps=1, logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["memory_norm_max"] > 0
    norms = state_norms(trainer.model(random_ids(1, 20), use_cache=True).past_key_values)
    assert norms["memory"][0] == norms["normaliser"][0] == 0 < norms["memory"][1]
