"""`from_pretrained` of our classes on a base: it gives what a conversion gives, or an error that says why not."""

import json
import logging
import sys

import peft
import pytest
import torch
from base_models import VARIANTS, base_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_gguf import base, write_gguf
from tiny import random_ids, tiny_model
from tokenizers_of_bases import save_base
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from infini_transformers.conversion import convert_from_infini, convert_to_infini
from modeling_infini import (
    InfiniConfig,
    InfiniForCausalLM,
    InfiniForSequenceClassification,
    InfiniForTokenClassification,
    InfiniModel,
)


N = 8


def fields_of(model) -> dict:
    """What a configuration says, but for where it comes from."""
    return {name: v for name, v in model.config.to_dict().items() if name not in ("_name_or_path", "auto_map")}


def require_equal(ours, expected, length: int = 3 * N + 2):
    ids = random_ids(2, length)
    with torch.no_grad():
        found, wanted = ours(ids), expected(ids)
    assert torch.equal(found[0], wanted[0])
    assert fields_of(ours) == fields_of(expected)
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for name, weight in expected.state_dict().items():
        assert ours.state_dict()[name].dtype == weight.dtype
        assert torch.equal(ours.state_dict()[name], weight) or name == "score.weight", name
    if ours.can_generate():
        assert ours.generation_config.to_diff_dict() == expected.generation_config.to_diff_dict()


@st.composite
def conversions(draw):
    """Options of a conversion of a base with 64 positions, whose own window is 9 or 11 tokens or none."""
    sliding = draw(st.sampled_from([None, "sliding", "segment"]))
    options = {
        "segment_length": draw(st.integers(4, 9)),
        "local_attention": sliding,
        "num_sink_tokens": None if sliding == "segment" else draw(st.sampled_from([None, 0, 1])),
        "head_gate_init_value": draw(st.sampled_from([None, 0.0, -1.5])),
        "use_mem_delta_rule": draw(st.sampled_from([None, True])),
        "memory_norm_init_scale": draw(st.sampled_from([None, 1.5])),
        "num_memory_slots": None if sliding == "segment" else draw(st.sampled_from([None, 3])),
        "memory_feature_map": draw(st.sampled_from(["elu", "exp"])),
        "token_gates": draw(st.booleans()),
        "memory_write_gate": draw(st.booleans()),
        "learned_delta_update": draw(st.booleans()),
        "memory_layers": draw(st.sampled_from([None, [1], []])),
    }
    if draw(st.booleans()):
        # Most are left out by most users.
        options = {name: options[name] for name in ("segment_length", "local_attention")}
    return {name: value for name, value in options.items() if value is not None}


@settings(max_examples=25, deadline=None)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    options=conversions(),
    dtype=st.sampled_from([None, "auto", "float32", torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["one file", "shards", "bin"]),
    given_config=st.sampled_from(["none", "folder", "object"]),
)
def test_a_base_becomes_what_its_conversion_is(tmp_path_factory, variant, options, dtype, layout, given_config):
    folder = tmp_path_factory.mktemp("bases")
    base = base_model(variant, dtype=torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="20KB" if layout == "shards" else "5GB")
    if layout == "bin":
        torch.save(base.state_dict(), folder / "base" / "pytorch_model.bin")
        (folder / "base" / "model.safetensors").unlink()
    convert_to_infini(folder / "base", folder / "ours", allow_bin=True, dtype=dtype or "auto", **options)
    expected, report = InfiniForCausalLM.from_pretrained(folder / "ours", output_loading_info=True)
    config = {"none": None, "folder": folder / "base", "object": AutoConfig.from_pretrained(folder / "base")}[
        given_config
    ]
    ours, info = InfiniForCausalLM.from_pretrained(
        folder / "base", config=config, dtype=dtype, output_loading_info=True, **options
    )
    require_equal(ours, expected)
    assert info == report
    # What is saved is a conversion like another.
    ours.save_pretrained(folder / "saved")
    require_equal(AutoModelForCausalLM.from_pretrained(folder / "saved"), expected)
    saved, written = (json.loads((folder / name / "config.json").read_text()) for name in ("saved", "ours"))
    assert saved == written
    assert "_new_weights" not in saved


def test_the_gates_are_nearly_closed_and_the_log_says_what_happens(tmp_path, caplog):
    base_model().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        model = InfiniForCausalLM.from_pretrained(tmp_path, segment_length=N)
    assert (model.local_shares() > 0.98).all()
    assert (model.config.local_attention, model.config.num_sink_tokens) == ("sliding", 4)
    assert "is a llama: it is converted while it is loaded, with segment_length=8 and 98 %" in caplog.text


@pytest.mark.parametrize("head", [InfiniModel, InfiniForSequenceClassification, InfiniForTokenClassification])
def test_other_heads(tmp_path, head):
    base_model("qwen2").save_pretrained(tmp_path / "base")
    convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N)
    options = {} if head is InfiniModel else {"num_labels": 3, "pad_token_id": 0}
    expected, report = head.from_pretrained(tmp_path / "ours", output_loading_info=True, **options)
    ours, info = head.from_pretrained(tmp_path / "base", segment_length=N, output_loading_info=True, **options)
    if head is not InfiniModel:
        ours.score.load_state_dict(expected.score.state_dict())
        assert (ours.num_labels, ours.score.out_features) == (3, 3)
    require_equal(ours, expected)
    assert info == report
    ours.save_pretrained(tmp_path / "saved")
    require_equal(head.from_pretrained(tmp_path / "saved"), ours)


def test_a_tokenizer_and_settings_of_generation_are_as_in_a_conversion(tmp_path):
    base = save_base(tmp_path / "base", model_max_length=64)
    fields = {"max_new_tokens": 7, "max_length": 64, "cache_implementation": "static", "use_cache": False}
    (base / "generation_config.json").write_text(json.dumps(fields))
    convert_to_infini(base, tmp_path / "ours", segment_length=N)
    ours = InfiniForCausalLM.from_pretrained(base, segment_length=N)
    require_equal(ours, InfiniForCausalLM.from_pretrained(tmp_path / "ours"))
    assert ours.generation_config.max_new_tokens == 7
    given = InfiniForCausalLM.from_pretrained(base, segment_length=N, generation_config=GenerationConfig(top_k=3))
    assert (given.generation_config.top_k, given.generation_config.max_new_tokens) == (3, None)
    # And the way back is the conversion's.
    ours.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "saved")
    convert_from_infini(tmp_path / "saved", tmp_path / "back")
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert {name: value for name, value in back.items() if name != "transformers_version"} == fields
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_fields_of_the_base_are_used(tmp_path):
    base_model().save_pretrained(tmp_path)
    fields = {"attention_dropout": 0.25, "use_cache": False, "output_attentions": True, "pad_token_id": 3}
    model = InfiniForCausalLM.from_pretrained(tmp_path, segment_length=N, attn_implementation="eager", **fields)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.config._attn_implementation == "eager"
    assert "use_cache" not in model.config.converted_from
    # The window of a Mistral is switched off as in its own class.
    base_model("mistral-window").save_pretrained(tmp_path / "mistral")
    options = {"segment_length": 12, "sliding_window": None}
    assert InfiniForCausalLM.from_pretrained(tmp_path / "mistral", **options).config.num_sink_tokens == 4
    with pytest.raises(ValueError, match="own sliding window of 9"):
        InfiniForCausalLM.from_pretrained(tmp_path / "mistral", segment_length=12)
    assert InfiniForCausalLM.from_pretrained(tmp_path / "mistral").config.segment_length == 9


def test_a_configuration_of_ours_decides(tmp_path, caplog):
    base_model().save_pretrained(tmp_path / "base")
    convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N)
    expected = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    logging.getLogger("transformers").propagate = True
    for load in (InfiniForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        require_equal(load(tmp_path / "base", config=expected.config), expected)
    assert "other fields" not in caplog.text
    config = InfiniConfig.from_pretrained(tmp_path / "ours", head_gate_init_value=0.0, rms_norm_eps=1e-3)
    model = InfiniForCausalLM.from_pretrained(tmp_path / "base", config=config, segment_length=7)
    assert (model.local_shares() == 0.5).all()
    assert (model.config.segment_length, model.config.rms_norm_eps) == (7, 1e-3)
    assert config.segment_length == N
    assert "other fields than the source's: ['rms_norm_eps']" in caplog.text
    config = InfiniConfig.from_pretrained(tmp_path / "ours", num_hidden_layers=3)
    with pytest.raises(ValueError, match="incomplete"):
        InfiniForCausalLM.from_pretrained(tmp_path / "base", config=config)


def test_a_gguf_file_is_converted_too(tmp_path):
    file = write_gguf(tmp_path / "base.gguf", base("llama"))
    convert_to_infini(file, tmp_path / "ours", segment_length=N)
    expected = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    require_equal(InfiniForCausalLM.from_pretrained(file, segment_length=N), expected)
    require_equal(InfiniForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", segment_length=N), expected)
    with pytest.raises(FileNotFoundError, match="There is no GGUF file"):
        InfiniForCausalLM.from_pretrained(tmp_path / "other.gguf", segment_length=N)


def test_a_subfolder(tmp_path):
    base_model().save_pretrained(tmp_path / "folder" / "base")
    convert_to_infini(tmp_path / "folder" / "base", tmp_path / "ours", segment_length=N)
    expected = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    options = {"subfolder": "base", "segment_length": N}
    require_equal(InfiniForCausalLM.from_pretrained(tmp_path / "folder", **options), expected)


def edit(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("factor", [1e6, 1e-9])
def test_values_that_float16_does_not_hold_are_refused_as_by_a_conversion(tmp_path, factor):
    base = base_model()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight *= factor
    base.save_pretrained(tmp_path / "base")
    options = {"segment_length": N, "dtype": torch.float16}
    for convert in (
        lambda: InfiniForCausalLM.from_pretrained(tmp_path / "base", **options),
        lambda: convert_to_infini(tmp_path / "base", tmp_path / "ours", **options),
    ):
        with pytest.raises(ValueError, match=r"up_proj\.weight"):
            convert()


REFUSED = {
    "mixture of experts": ({"num_local_experts": 8}, "mixture of experts"),
    "another type": ({"model_type": "gpt2"}, 'Cannot convert a model of type "gpt2"'),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights; save a dequant"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "code of its own"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial rotary"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_converted_is_refused_as_by_a_conversion(tmp_path, kind):
    fields, message = REFUSED[kind]
    base_model().save_pretrained(tmp_path / "base")
    edit(tmp_path / "base", **fields)
    for load in (
        lambda: InfiniForCausalLM.from_pretrained(tmp_path / "base", segment_length=N),
        lambda: InfiniForCausalLM.from_pretrained(
            tmp_path / "base", segment_length=N, config=LlamaConfig(**base_model().config.to_dict())
        ),
        lambda: InfiniForCausalLM.from_pretrained(tmp_path / "base", config=tiny_model().config),
        lambda: convert_to_infini(tmp_path / "base", tmp_path / "out", segment_length=N),
    ):
        with pytest.raises(ValueError, match=message):
            load()


def test_weights_that_do_not_fit_are_refused(tmp_path):
    base_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for changed, message in (
        ({**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(6)}, "1 weights that a llama has not"),
        ({n: w for n, w in weights.items() if "1.mlp.up" not in n}, "incomplete: 1 weights are missing"),
        ({**weights, "model.norm.weight": torch.ones(24, dtype=torch.int8)}, "quantized weights"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            InfiniForCausalLM.from_pretrained(tmp_path, segment_length=N)


def test_a_head_of_its_own_is_not_tied(tmp_path):
    base = base_model("qwen2")
    base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    convert_to_infini(tmp_path / "base", tmp_path / "ours", segment_length=N)
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "base", segment_length=N)
    require_equal(ours, InfiniForCausalLM.from_pretrained(tmp_path / "ours"))
    assert ours.lm_head.weight is not ours.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "segment_length is needed"),
        ({"segment_length": 31}, ValueError, r"= 66 must not exceed the 64 positions"),
        ({"segment_length": N, "memory": "x"}, TypeError, "load_memory"),
        ({"segment_length": N, "transfer": ["x"]}, TypeError, "convert_to_infini"),
        ({"segment_length": N, "variant": "fp16"}, TypeError, r"rename model.<variant>"),
        ({"segment_length": N, "use_safetensors": False}, ValueError, "use_safetensors"),
        ({"segment_length": N, "segment_lenght": 3}, TypeError, "segment_lenght"),
        ({"segment_length": N, "qk_norm": True}, TypeError, "qk_norm"),
        ({"segment_length": N, "dtype": "floaty"}, ValueError, "no dtype of weights"),
        ({"segment_length": N, "config": LlamaConfig(vocab_size=32)}, ValueError, "missing or of another shape"),
        ({"segment_length": N, "config": base_model("qwen3").config}, ValueError, "is of a qwen3, and"),
    ],
)
def test_arguments_are_used_or_refused(tmp_path, options, error, message):
    base_model().save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        InfiniForCausalLM.from_pretrained(tmp_path, **options)


def test_paths_that_lead_to_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (
        lambda name: InfiniForCausalLM.from_pretrained(name, segment_length=N),
        lambda name: convert_to_infini(name, tmp_path / "out", segment_length=N),
    ):
        for name in ("path/to/llama", "/path/to/llama", "./llama"):
            with pytest.raises(FileNotFoundError, match=f"There is no folder or file {name} .seen from {tmp_path}"):
                load(name)
        with pytest.raises(FileNotFoundError, match="Python does not expand ~: write /"):
            load("~/llama")
        with pytest.raises(FileNotFoundError, match="There is no GGUF file"):
            load("llama.gguf")


def adapter_of(model, folder):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_an_adapter_of_a_base_is_refused_and_one_of_ours_is_loaded(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "infini")
    adapter = adapter_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"PEFT adapter, not a model\. Merge it"):
        InfiniForCausalLM.from_pretrained(adapter, segment_length=N)
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "infini")
    adapter = adapter_of(ours, tmp_path / "of-ours")
    again = InfiniForCausalLM.from_pretrained(adapter)
    with torch.no_grad():
        assert torch.equal(again(random_ids(1, 9)).logits, ours(random_ids(1, 9)).logits)


def test_layers_on_the_disk_have_no_memory_there(tmp_path):
    base_model().save_pretrained(tmp_path)
    places = dict.fromkeys(
        ["model.embed_tokens", "lm_head", "model.layers.0", "model.norm", "model.rotary_emb"], "cpu"
    )
    options = {"device_map": places | {"model.layers.1": "disk"}, "offload_folder": tmp_path / "off"}
    with pytest.raises(ValueError, match="device_map leaves layers on the disk"):
        InfiniForCausalLM.from_pretrained(tmp_path, segment_length=N, **options)


def test_code_of_the_hub_alone_says_what_to_install(tmp_path, monkeypatch):
    base_model().save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "infini")
    remote = type(AutoModelForCausalLM.from_pretrained(tmp_path / "infini", trust_remote_code=True))
    expected = InfiniForCausalLM.from_pretrained(tmp_path / "base", segment_length=N)
    require_equal(InfiniForCausalLM.from_pretrained(tmp_path / "base", segment_length=N), expected)
    monkeypatch.setitem(sys.modules, "infini_transformers.conversion.while_loading", None)
    with pytest.raises(ImportError, match="install infini-transformers"):
        remote.from_pretrained(tmp_path / "base", segment_length=N)


def test_a_configuration_of_another_model_is_none_of_ours(tmp_path):
    base_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of type 'llama'.*InfiniForCausalLM.from_pretrained"):
        InfiniConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"takes an InfiniConfig, not a LlamaConfig"):
        InfiniForCausalLM(base_model().config)
    tiny_model().save_pretrained(tmp_path / "infini")
    with pytest.raises(ValueError, match=r"takes an InfiniConfig, not a LlamaConfig"):
        InfiniForCausalLM.from_pretrained(tmp_path / "infini", config=base_model().config)


def test_an_adapter_of_it_is_saved_and_is_not_taken_for_one_of_the_base(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(InfiniForCausalLM.from_pretrained(tmp_path / "base", segment_length=N), lora)
    tuned.save_pretrained(tmp_path / "adapter")
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    again = InfiniForCausalLM.from_pretrained(tmp_path / "base", segment_length=N)
    ids = random_ids(2, 3 * N)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()(ids).logits
        assert torch.equal(found, tuned.eval()(ids).logits)


class OwnConfig(InfiniConfig):
    model_type = "own-infini"


class OwnModel(InfiniForCausalLM):
    config_class = OwnConfig


def test_a_configuration_of_another_name_is_still_ours(tmp_path):
    model = OwnModel(OwnConfig(**{**tiny_model().config.to_dict(), "model_type": "own-infini"})).eval()
    model.save_pretrained(tmp_path)
    again, ids = OwnModel.from_pretrained(tmp_path), random_ids(1, 2 * N)
    assert torch.equal(again.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))
    assert type(again.config) is OwnConfig
