"""Every supported architecture, there and back: P1 on the way, and the same bytes after the return."""

import json

import pytest
import torch
from base_models import SIZES, VARIANTS, base_model
from safetensors.torch import load_file
from tiny import random_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from modeling_infini import InfiniForCausalLM


def convert(tmp_path, variant="llama", dtype=torch.float32, **options):
    base_model(variant, dtype).save_pretrained(tmp_path / "base")
    convert_to_infini(tmp_path / "base", tmp_path / "infini", **{"segment_length": 9, **options})
    # Loaded, since `.to(dtype)` rounds the frequencies of RoPE, which loading does not.
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return base, InfiniForCausalLM.from_pretrained(tmp_path / "infini")


@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(tmp_path, variant, dtype, local_attention):
    base, ours = convert(tmp_path, variant, dtype, local_attention=local_attention)
    assert ours.dtype == dtype
    assert ours.config.local_attention == local_attention
    for length in (1, 8, 9):
        ids = random_ids(2, length, seed=length)
        with torch.no_grad():
            assert torch.equal(ours(ids).logits, base(ids).logits)
            assert torch.equal(ours(ids, use_cache=False).logits, base(ids).logits)

    convert_from_infini(tmp_path / "infini", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "back"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name].view(torch.uint8), weight.view(torch.uint8))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "back")]
    assert configs[0] == configs[1]
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(base)
    with torch.no_grad():
        assert torch.equal(back(random_ids(2, 30)).logits, base(random_ids(2, 30)).logits)


@pytest.mark.parametrize("variant", ["mistral-window", "qwen2-window"])
def test_a_window_of_the_sources_own_is_kept(tmp_path, variant):
    max_window_layers = {"max_window_layers": 0} if variant.startswith("qwen") else {}
    base = base_model(variant, **max_window_layers)
    base.save_pretrained(tmp_path / "base")
    convert_to_infini(tmp_path / "base", tmp_path / "infini", head_gate_init_value=1000)
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "infini")
    window = base.config.sliding_window
    config = ours.config
    assert (config.segment_length, config.local_attention, config.num_sink_tokens) == (window, "sliding", 0)
    # With its memory shut out, the model is the source at any length.
    ids = random_ids(2, 6 * window)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f"must not exceed the source's own sliding window of {window} tokens"):
        convert_to_infini(tmp_path / "base", tmp_path / "other", segment_length=window + 1)


def test_layers_without_a_window_keep_the_default_sinks(tmp_path):
    _, ours = convert(tmp_path, "qwen2-window")
    assert ours.config.num_sink_tokens == 4


def test_fields_that_mean_something_are_kept(tmp_path):
    fields = {"attention_dropout": 0.1, "initializer_range": 0.3, "rms_norm_eps": 3e-5, "pad_token_id": 2}
    base = base_model("qwen3-biases", **fields)
    base.config.id2label = {0: "no", 1: "yes"}
    base.config.my_own_note = "kept"
    base.save_pretrained(tmp_path / "base")
    convert_to_infini(tmp_path / "base", tmp_path / "infini", segment_length=9)
    config = AutoConfig.from_pretrained(tmp_path / "infini")
    for name, value in {**fields, "id2label": {0: "no", 1: "yes"}, "my_own_note": "kept"}.items():
        assert getattr(config, name) == value
    for name in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters", "max_position_embeddings"):
        assert getattr(config, name) == getattr(base.config, name)
    # A window's fields would make generate() and the masks believe in another attention.
    assert not hasattr(config, "sliding_window")
    assert not hasattr(config, "layer_types")


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 3,
    "long_factor": [2.0] * 3,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral"}, 'of type "mixtral". Supported are the model types "llama", "mistral"'),
        ({"model_type": "gpt2"}, 'of type "gpt2"'),
        ({"model_type": "no-such-type"}, 'of type "no-such-type"'),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"partial_rotary_factor": 0.5}, r"partial rotary embeddings \(0.5 of each head\)"),
        ({"final_logit_softcapping": 30.0}, "soft-capping of logits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        ({"rope_parameters": LONG_ROPE}, 'rope_type="longrope" is not supported'),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, fields, message):
    base_model().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        convert_to_infini(tmp_path / "base", tmp_path / "infini", segment_length=9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_a_real_mixture_of_experts_is_refused(tmp_path):
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match='of type "mixtral"'):
        convert_to_infini(tmp_path / "base", tmp_path / "infini", segment_length=9)


def test_trained_gates_are_dropped_only_when_asked(tmp_path):
    _, ours = convert(tmp_path)
    with torch.no_grad():
        ours.model.layers[1].self_attn.head_gates.weight[2] += 0.01
    ours.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn.head_gates.weight differs.*drop_gates=True"):
        convert_from_infini(tmp_path / "trained", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    convert_from_infini(tmp_path / "trained", tmp_path / "back", drop_gates=True)
    assert AutoConfig.from_pretrained(tmp_path / "back").model_type == "llama"


def test_other_base_architectures_can_be_named_if_they_have_the_parameters(tmp_path):
    convert(tmp_path, "llama", local_attention="sliding", num_sink_tokens=0)
    convert_from_infini(tmp_path / "infini", tmp_path / "mistral", model_type="mistral")
    # Full attention, as a llama of the same model.
    assert AutoConfig.from_pretrained(tmp_path / "mistral").sliding_window is None
    with pytest.raises(ValueError, match=r'qkv_bias=False.*"qwen2" cannot represent that'):
        convert_from_infini(tmp_path / "infini", tmp_path / "qwen2", model_type="qwen2")
    with pytest.raises(ValueError, match='model_type="gpt2" is not supported'):
        convert_from_infini(tmp_path / "infini", tmp_path / "gpt2", model_type="gpt2")
    with pytest.raises(ValueError, match='no Infini-attention checkpoint, but of type "llama"'):
        convert_from_infini(tmp_path / "base", tmp_path / "back")


def test_a_window_of_the_sources_own_is_not_lost_in_another_architecture(tmp_path):
    convert(tmp_path, "mistral-window")
    with pytest.raises(ValueError, match="from a Mistral that sees 9 tokens; a llama has no such window"):
        convert_from_infini(tmp_path / "infini", tmp_path / "back", model_type="llama")


def test_norms_of_a_memory_that_was_not_trained_are_no_loss(tmp_path):
    base, ours = convert(tmp_path, memory_norm_init_scale=3.0)
    convert_from_infini(tmp_path / "infini", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(back(random_ids(2, 30)).logits, base(random_ids(2, 30)).logits)
    with torch.no_grad():
        ours.model.layers[1].self_attn.memory.key_norm.weight[0] += 0.1
    ours.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"memory.key_norm.weight differs from its initial value"):
        convert_from_infini(tmp_path / "trained", tmp_path / "other")


@pytest.mark.parametrize("variant", ["qwen3", "qwen2-window"])
def test_layers_may_have_been_cut(tmp_path, variant):
    _, ours = convert(tmp_path, variant)
    del ours.model.layers[1:]
    ours.config.num_hidden_layers = 1
    ours.save_pretrained(tmp_path / "cut")
    if variant == "qwen2-window":
        with pytest.raises(ValueError, match="1 layers, and was converted from 2 of several kinds"):
            convert_from_infini(tmp_path / "cut", tmp_path / "back")
    else:
        convert_from_infini(tmp_path / "cut", tmp_path / "back")
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        with torch.no_grad():
            assert torch.equal(back(random_ids(2, 9)).logits, ours(random_ids(2, 9)).logits)


@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "llama"),
        ({"attention_bias": True, "mlp_bias": True}, "llama"),
        ({"qkv_bias": True, "attention_output_bias": False}, "qwen2"),
        ({"qk_norm": True, "attention_bias": True}, "qwen3"),
    ],
)
def test_a_model_made_here_becomes_the_architecture_that_has_its_parameters(tmp_path, fields, model_type):
    model = tiny_model(segment_length=9, **fields)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.head_gates.weight)
    model.save_pretrained(tmp_path / "infini")
    convert_from_infini(tmp_path / "infini", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.model_type == model_type
    with torch.no_grad():
        torch.testing.assert_close(back(random_ids(2, 9)).logits, model(random_ids(2, 9)).logits)


def test_what_no_base_architecture_has_is_refused(tmp_path):
    tiny_model(lm_head_bias=True).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"lm_head_bias=True.*cannot represent that"):
        convert_from_infini(tmp_path / "head", tmp_path / "back")
    model = tiny_model(learned_delta_update=True)
    model.save_pretrained(tmp_path / "strength")
    with pytest.raises(ValueError, match="drop_gates"):
        convert_from_infini(tmp_path / "strength", tmp_path / "back")
    convert_from_infini(tmp_path / "strength", tmp_path / "back", drop_gates=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
