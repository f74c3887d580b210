"""
Linear layers in int8: the gates, norms and memory stay as they are, and the rounded weights are all that changes.

The skipped modules are named as regular expressions from the start of the name, since torchao compares them with names
that end in `.weight`.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import EVERY_OPTION, random_ids, relative_error, tiny_model
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from infini_transformers.evaluation.haystacks import repeated_sentence
from infini_transformers.evaluation.losses import memory_off
from infini_transformers.evaluation.passkey import passkey_example
from infini_transformers.evaluation.retrieval import score
from modeling_infini import InfiniCache, InfiniForCausalLM


PASSKEY_MODEL = Path(__file__).parent.parent / "checkpoints" / "passkey"
KEPT = ["lm_head", r".*\.(memory\..*|slot_score)"]
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PROJECTIONS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def torchao_config():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=KEPT)


def quanto_config():
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8", modules_to_not_convert=KEPT)


def bitsandbytes_config():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)


weight_only = pytest.mark.parametrize("quantization", [torchao_config, quanto_config], ids=["torchao", "quanto"])
all_tools = pytest.mark.parametrize(
    "quantization", [torchao_config, quanto_config, bitsandbytes_config], ids=["torchao", "quanto", "bitsandbytes"]
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with all that can stand on the way to the memory."""
    path = tmp_path_factory.mktemp("float")
    biases = {name: False for name in EVERY_OPTION if name.endswith("bias")}
    model = tiny_model(**{**EVERY_OPTION, "memory_layers": None, **biases, "hidden_size": 32, "head_dim": 8})
    model.save_pretrained(path)
    return path


def quantized_names(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if type(weight) is not nn.Parameter}


def dequantized(model, float_model):
    """The float model with the quantized model's weights."""
    found = copy.deepcopy(float_model)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in quantized_names(model):
            found.get_parameter(name).copy_(weights[name].dequantize())
    return found


@all_tools
@both_dtypes
def test_the_projections_are_quantized_and_nothing_else(folder, quantization, dtype):
    expected = dict(InfiniForCausalLM.from_pretrained(folder, dtype=dtype).named_parameters())
    model = InfiniForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization())
    names = {f"model.layers.{layer}.{projection}.weight" for layer in range(2) for projection in PROJECTIONS}
    assert quantized_names(model) == names
    for name, weight in model.named_parameters():
        if name not in names:
            assert weight.dtype == expected[name].dtype, name
            assert torch.equal(weight, expected[name]), name


@weight_only
def test_rounded_weights_are_all_that_changes(folder, quantization):
    float_model, ids = InfiniForCausalLM.from_pretrained(folder), random_ids(2, 23)
    model = InfiniForCausalLM.from_pretrained(folder, quantization_config=quantization())
    rounded = dequantized(model, float_model)
    for name in quantized_names(model):
        error = relative_error(rounded.get_parameter(name), float_model.get_parameter(name))
        assert 0 < error < 1 / 127, name
    with torch.no_grad():
        found, expected = model(ids).logits, float_model(ids).logits
        assert relative_error(found, rounded(ids).logits) < 1e-4
    assert relative_error(found, expected) < 0.15
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.95


def test_write_gates_that_are_rounded_are_gates_still(folder):
    quanto, ids = pytest.importorskip("optimum.quanto"), random_ids(2, 23)
    model, expected = (InfiniForCausalLM.from_pretrained(folder) for _ in range(2))
    quanto.quantize(model, weights=quanto.qint8, include=["*write_gate"])
    quanto.freeze(model)
    assert "QLinear" in type(model.model.layers[0].self_attn.memory.write_gate).__name__
    with torch.no_grad():
        assert relative_error(model(ids).logits, expected(ids).logits) < 0.05


@all_tools
@both_dtypes
def test_it_generates_past_several_segments_with_a_float32_memory(folder, quantization, dtype):
    model = InfiniForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization())
    out = model.generate(random_ids(2, 13), max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, InfiniCache)
    assert cache.tokens_read.tolist() == [32, 32]
    for name, state in cache.layers[-1].states().items():
        kinds = {"keys": dtype, "values": dtype, "places": torch.long}
        assert state.dtype == kinds.get(name.split("_")[-1], torch.float32), name
    assert cache.layers[-1].memory.isfinite().all()
    assert cache.layers[-1].memory.abs().sum() > 0


@weight_only
def test_it_generates_what_the_rounded_model_does(folder, quantization):
    float_model, ids = InfiniForCausalLM.from_pretrained(folder), random_ids(2, 13)
    model = InfiniForCausalLM.from_pretrained(folder, quantization_config=quantization())
    options = {"max_new_tokens": 20, "do_sample": False}
    found = model.generate(ids, **options)
    assert torch.equal(found, dequantized(model, float_model).generate(ids, **options))
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))


@all_tools
def test_the_passkey_is_still_found_by_the_memory(quantization):
    model = InfiniForCausalLM.from_pretrained(PASSKEY_MODEL, quantization_config=quantization())
    assert quantized_names(model)
    tokenizer = AutoTokenizer.from_pretrained(PASSKEY_MODEL)
    filler = repeated_sentence(tokenizer)
    example = passkey_example(tokenizer, filler, 4096, depth=0.5, generator=np.random.default_rng(0))
    assert score(model, example).exact
    with memory_off(model):
        assert not score(model, example).exact


def test_a_torchao_model_is_saved_and_loaded(folder, tmp_path):
    model, ids = InfiniForCausalLM.from_pretrained(folder, quantization_config=torchao_config()), random_ids(2, 23)
    model.save_pretrained(tmp_path)
    loaded = InfiniForCausalLM.from_pretrained(tmp_path)
    assert quantized_names(loaded) == quantized_names(model)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_quanto_model_is_saved_by_quanto_alone(folder, tmp_path):
    quanto = pytest.importorskip("optimum.quanto")
    model, ids = InfiniForCausalLM.from_pretrained(folder, quantization_config=quanto_config()), random_ids(2, 23)
    with pytest.raises(ValueError, match="is not serializable"):
        model.save_pretrained(tmp_path)
    loaded = InfiniForCausalLM.from_pretrained(folder)
    quanto.requantize(loaded, model.state_dict(), quanto.quantization_map(model), device=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_quantized_by_hand_is_quantized_by_transformers(folder):
    quantization, ids = pytest.importorskip("torchao.quantization"), random_ids(2, 23)

    def is_projection(module, name):
        return isinstance(module, nn.Linear) and name.endswith("_proj")

    model = InfiniForCausalLM.from_pretrained(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_projection)
    expected = InfiniForCausalLM.from_pretrained(folder, quantization_config=torchao_config())
    assert quantized_names(model) == quantized_names(expected)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_quanto_by_hand_is_quantized_by_transformers(folder):
    quanto, ids = pytest.importorskip("optimum.quanto"), random_ids(2, 23)
    model = InfiniForCausalLM.from_pretrained(folder)
    quanto.quantize(model, weights=quanto.qint8, include=["*_proj"])
    quanto.freeze(model)
    expected = InfiniForCausalLM.from_pretrained(folder, quantization_config=quanto_config())
    assert quantized_names(model) == quantized_names(expected)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
