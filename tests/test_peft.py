"""PEFT: LoRA on the projections with the gates trained beside it, and other methods in generate()."""

import copy

import pytest
import torch
from peft import (
    CartridgeConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from tiny import EVERY_OPTION, MODES, random_ids, tiny_model
from training import ONE_STEP, assert_weights, stock_trainer, text_rows, weights_after_a_step_by_hand

from modeling_infini import InfiniForCausalLM


IDS = random_ids(2, 17)


def with_adapters(model, **fields) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["head_gates"],
        **fields,
    )
    return get_peft_model(model, config)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(params=MODES, ids=lambda fields: "-".join(map(str, fields.values())))
def fields(request):
    return request.param


@pytest.fixture
def trained(tmp_path, fields):
    model = with_adapters(tiny_model(**fields))
    options = {"max_steps": 10, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    stock_trainer(model, text_rows(), tmp_path, **options).train()
    return model.eval()


def test_adapters_and_gates_train_and_nothing_else(trained, fields):
    base, untrained = tiny_model(**fields), with_adapters(tiny_model(**fields))
    before = dict(untrained.named_parameters())
    for name, weight in trained.named_parameters():
        is_trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(weight, before[name]) != is_trained, name
    moved = (trained.local_shares() - base.local_shares()).abs()
    assert moved.shape == (2, 4)
    assert moved.min() > 0
    assert moved.mean() > 0.01
    with trained.disable_adapter():
        assert torch.equal(logits_of(trained), logits_of(base))
        assert torch.equal(trained.local_shares(), base.local_shares())


def test_an_adapter_is_saved_with_its_gates_and_loaded(tmp_path, trained, fields):
    trained.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("head_gates" in name for name in saved) == 2
    loaded = PeftModel.from_pretrained(tiny_model(**fields), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(trained))
    assert torch.equal(loaded.local_shares(), trained.local_shares())


def test_a_merged_model_is_an_ordinary_one(tmp_path, trained, fields):
    expected, shares = logits_of(trained), trained.local_shares()
    generated = trained.generate(IDS, max_new_tokens=7)
    merged = trained.merge_and_unload()
    assert set(merged.state_dict()) == set(tiny_model(**fields).state_dict())
    merged.save_pretrained(tmp_path / "merged")
    loaded = InfiniForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (merged, loaded):
        torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.local_shares(), shares)
        assert torch.equal(model.generate(IDS, max_new_tokens=7), generated)


def test_adapters_of_all_linear_layers_are_merged_those_of_the_memory_included():
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(**EVERY_OPTION), config)
    attention = model.base_model.model.model.layers[1].self_attn
    memory = attention.memory
    for layer in (memory.write_gate, memory.write_strength, memory.token_gate, attention.slot_score):
        assert "lora" in str(layer)
    expected = logits_of(model)
    torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_step_is_the_step_by_hand_with_gradient_checkpointing_too(tmp_path, fields, use_reentrant):
    model, rows = with_adapters(tiny_model(**fields), init_lora_weights=False), text_rows()
    expected = weights_after_a_step_by_hand(model, rows)
    assert len(expected) == 2 * (4 * 2 + 1)
    checkpointing = {}
    if use_reentrant is not None:
        checkpointing["gradient_checkpointing"] = True
        checkpointing["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        model.enable_input_require_grads()
    stock_trainer(model, rows, tmp_path, **ONE_STEP, **checkpointing).train()
    assert_weights(model, expected)


def test_smoothed_labels_are_shifted_under_adapters_too(tmp_path):
    model, rows = with_adapters(tiny_model(), init_lora_weights=False), text_rows()
    expected = weights_after_a_step_by_hand(model, rows, smoothing=0.3)
    stock_trainer(model, rows, tmp_path, label_smoothing_factor=0.3, **ONE_STEP).train()
    assert_weights(model, expected)


def test_gates_are_trained_in_float32_in_a_bfloat16_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = with_adapters(InfiniForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
    stock_trainer(model, text_rows(), tmp_path, max_steps=2, learning_rate=1e-2, bf16=True).train()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    merged = model.merge_and_unload()
    assert merged.lm_head.weight.dtype == torch.bfloat16
    assert merged.model.layers[0].self_attn.head_gates.weight.dtype == torch.float32


SOFT_PROMPTS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.parametrize("config", SOFT_PROMPTS.values(), ids=SOFT_PROMPTS)
def test_soft_prompts_are_read_before_the_text(fields, config):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(**fields), copy.deepcopy(config)).eval()
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=IDS, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids=IDS, **options), expected)
    padded, mask = torch.cat([IDS, IDS[:, :4]], 1), torch.ones(2, 21, dtype=torch.long)
    mask[:, 17:] = 0
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options)[:, 21:], expected[:, 17:])
    cache = model.new_cache()
    with torch.no_grad():
        model.get_base_model()(IDS[:1], past_key_values=cache)
    for asked in ({"past_key_values": cache}, {"prompt_lookup_num_tokens": 1}):
        with pytest.raises(ValueError, match="PEFT's prompt learning reads one token per call"):
            model.generate(input_ids=IDS[:1], **asked, **options)


@pytest.mark.parametrize("kind", [PrefixTuningConfig, CartridgeConfig])
def test_prefixes_in_a_cache_of_their_own_are_refused(kind):
    model = get_peft_model(tiny_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for call in (model.generate, model):
        with pytest.raises(
            TypeError, match="must be an InfiniCache, got DynamicCache: no other cache holds the memory"
        ):
            call(input_ids=IDS)


def test_scales_of_ia3_generate_as_without_a_cache(fields):
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    model = get_peft_model(tiny_model(**fields), config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1.5 if "ia3" in name else 1)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(input_ids=IDS, use_cache=False, **options)
    assert torch.equal(model.generate(input_ids=IDS, **options), expected)
