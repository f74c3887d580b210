"""Checkpoints from before the memory had a module of its own load, and are saved by today's names."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import EVERY_OPTION, random_ids, tiny_config, tiny_model
from training import stock_trainer, text_rows
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, QuantoConfig

from infini_transformers.conversion.from_infini import convert_from_infini
from infini_transformers.conversion.inspection import inspect_checkpoint
from modeling_infini import InfiniForCausalLM, InfiniForSequenceClassification, InfiniModel


OPTIONS = {
    "norms": {"memory_norm_init_scale": 1.5},
    "write gate": {"memory_write_gate": True},
    "strength": {"learned_delta_update": True},
    "all": EVERY_OPTION,
}
FORMER = {
    "memory.query_norm.": "memory_query_norm.",
    "memory.key_norm.": "memory_key_norm.",
    "memory.write_gate.": "memory_write_gate.",
    "memory.write_strength.": "write_strength.",
}


def former(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights by the names that they had."""
    pattern = re.compile("|".join(map(re.escape, FORMER)))
    renamed = {pattern.sub(lambda found: FORMER[found[0]], name): weight for name, weight in weights.items()}
    assert len(renamed) == len(weights)
    return renamed


def rewrite(folder) -> None:
    """Makes a saved model, or adapter, one of before."""
    (file,) = folder.glob("*.safetensors")
    save_file(former(load_file(file)), file, {"format": "pt"})


def assert_same_weights(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def model(request):
    return tiny_model(**request.param)


@pytest.mark.parametrize("rename", [former, dict])
def test_a_state_dict_loads_by_both_names(model, rename):
    for part in (model, model.model):
        given = rename(part.state_dict())
        names = list(given)
        other = type(part)(model.config)
        other.load_state_dict(given)
        assert_same_weights(other.state_dict(), part.state_dict())
        assert list(given) == names


@pytest.mark.parametrize("max_shard_size", ["5GB", 4000])
def test_a_checkpoint_loads_and_is_saved_by_the_names_of_today(model, max_shard_size, tmp_path):
    expected = model.state_dict()
    model.save_pretrained(tmp_path / "today", max_shard_size=max_shard_size)
    saved = {}
    for file in (tmp_path / "today").glob("*.safetensors"):
        saved |= load_file(file)
        save_file(former(load_file(file)), file, {"format": "pt"})
    assert_same_weights(saved, expected)
    for index in (tmp_path / "today").glob("*.index.json"):
        fields = json.loads(index.read_text())
        index.write_text(json.dumps({**fields, "weight_map": former(fields["weight_map"])}))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "today", output_loading_info=True)
    assert not any(report.values())
    assert_same_weights(loaded.state_dict(), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_weights(load_file(tmp_path / "again" / "model.safetensors"), expected)


def test_every_head_loads_it(tmp_path):
    model = tiny_model(**EVERY_OPTION)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path)
    for auto, kind, head in (
        (AutoModel, InfiniModel, set()),
        (AutoModelForSequenceClassification, InfiniForSequenceClassification, {"score.weight"}),
    ):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is kind
        assert set(report["missing_keys"]) == head
        assert set(report["unexpected_keys"]) == {"lm_head.weight", "lm_head.bias"}
        assert_same_weights(loaded.base_model.state_dict(), model.model.state_dict())


def test_what_is_missing_or_unexpected_is_reported(tmp_path):
    model = tiny_model(memory_write_gate=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path)
    config = tiny_config(learned_delta_update=True)
    _, report = InfiniForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    at = "model.layers.{}.self_attn.memory."
    assert set(report["missing_keys"]) == {at.format(layer) + "write_strength.weight" for layer in range(2)}
    assert set(report["unexpected_keys"]) == {
        at.format(layer) + f"write_gate.{kind}" for layer in range(2) for kind in ("weight", "bias")
    }
    with pytest.raises(RuntimeError, match=r"self_attn\.memory\.write_strength\.weight"):
        InfiniForCausalLM(config).load_state_dict(former(model.state_dict()))


def test_it_is_quantized(tmp_path):
    pytest.importorskip("optimum.quanto")
    tiny_model(**EVERY_OPTION).save_pretrained(tmp_path)
    quantized = [InfiniForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8"))]
    rewrite(tmp_path)
    quantized.append(InfiniForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig("int8")))
    gate = quantized[1].model.layers[1].self_attn.memory.write_gate
    assert "QLinear" in type(gate).__name__
    with torch.no_grad():
        assert torch.equal(*(model(random_ids(1, 12)).logits for model in quantized))


def test_a_training_goes_on(tmp_path):
    options = {"learning_rate": 1e-2, "save_steps": 2, "max_steps": 4, "save_strategy": "steps"}
    expected = tiny_model(**EVERY_OPTION)
    stock_trainer(expected, text_rows(), tmp_path, **options).train()
    rewrite(tmp_path / "checkpoint-2")
    found = tiny_model(seed=1, **EVERY_OPTION)
    stock_trainer(found, text_rows(), tmp_path, **options).train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert_same_weights(found.state_dict(), expected.state_dict())


def test_adapters_load(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "write_strength"], init_lora_weights=False)
    adapted = get_peft_model(tiny_model(**EVERY_OPTION), config).eval()
    adapted.save_pretrained(tmp_path)
    rewrite(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(**EVERY_OPTION), tmp_path).eval()
    assert_same_weights(loaded.state_dict(), adapted.state_dict())


def test_conversions_read_it(tmp_path):
    model = tiny_model(memory_norm_init_scale=1.5, memory_write_gate=True)
    model.save_pretrained(tmp_path / "infini")
    today = inspect_checkpoint(tmp_path / "infini")
    rewrite(tmp_path / "infini")
    found = inspect_checkpoint(tmp_path / "infini")
    assert (found.parameters, found.state_nbytes) == (today.parameters, today.state_nbytes)
    assert torch.equal(found.local_shares, today.local_shares)
    with pytest.raises(ValueError, match="was trained or set"):
        convert_from_infini(tmp_path / "infini", tmp_path / "back")
    convert_from_infini(tmp_path / "infini", tmp_path / "back", drop_gates=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert_same_weights(base, {name: model.state_dict()[name] for name in base})
