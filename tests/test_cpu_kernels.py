"""`examples/cpu_kernels.py` changes how linear layers are computed, and nothing else."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import MODES, random_ids, relative_error, tiny_config, tiny_model
from torch import nn
from torch._inductor.utils import fresh_cache
from transformers import CompileConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from examples import cpu_kernels
from examples.cpu_kernels import CPUMLP, CPULinear, row_product, use_cpu_kernels
from modeling_infini import InfiniForCausalLM


widths = st.integers(1, 40)


def pair(before, after, bias=True, dtype=torch.float32):
    """A linear layer and its copy with our kernels."""
    torch.manual_seed(0)
    layer = nn.Linear(before, after, bias=bias, dtype=dtype)
    return layer, use_cpu_kernels(copy.deepcopy(nn.Sequential(layer)))[0]


@given(widths, widths, st.lists(st.integers(0, 5), max_size=3), st.booleans(), st.booleans())
def test_the_product_and_its_gradients_are_those_of_a_linear_layer(before, after, shape, bias, is_strided):
    layers = pair(before, after, bias)
    assert type(layers[1]) is CPULinear
    input = torch.randn(*shape, before)
    if is_strided:
        input = torch.randn(before, *shape).movedim(0, -1)
        for layer in layers:
            layer.bias = nn.Parameter(torch.ones(after, 2)[:, 0]) if bias else None
    upstream = torch.randn(*shape, after)
    found = []
    for layer in layers:
        states = input.detach().requires_grad_()
        output = layer(states)
        gradients = torch.autograd.grad(output, [states, *layer.parameters()], upstream)
        with torch.no_grad():
            found.append([output, layer(states), *gradients])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@given(widths, widths, st.integers(0, 3), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_a_row_times_a_matrix_is_a_sum(before, after, num_dimensions, bias, dtype):
    layer, _ = pair(before, after, bias, dtype)
    row = torch.randn(*(1,) * num_dimensions, before, dtype=dtype)
    torch.testing.assert_close(row_product(row, layer.weight, layer.bias), layer(row), atol=1e-5, rtol=1e-4)


def test_a_bfloat16_row_is_summed_in_float32():
    layer, _ = pair(512, 8, dtype=torch.bfloat16)
    row = torch.randn(1, 512, dtype=torch.bfloat16)
    exact = layer.double()(row.double()).bfloat16()
    torch.testing.assert_close(row_product(row, layer.bfloat16().weight, layer.bias), exact)


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias"), ("input", "bias")])
def test_what_backward_does_not_need_is_not_kept(frozen):
    saved = []
    for layer in pair(8, 8):
        layer.weight.requires_grad_("weight" not in frozen)
        layer.bias.requires_grad_("bias" not in frozen)
        input = torch.randn(4, 8, requires_grad="input" not in frozen)
        saved.append([])
        with torch.autograd.graph.saved_tensors_hooks(saved[-1].append, lambda states: states):
            layer(input)
    assert len(saved[0]) == len(saved[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "autocast"])
def test_whatever_is_not_float32_is_left_to_pytorch(dtype):
    is_autocast = dtype == "autocast"
    layers = pair(16, 8, dtype=torch.float32 if is_autocast else dtype)
    input = torch.randn(3, 16, dtype=layers[0].weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        expected, found = (layer(input) for layer in layers)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_onednn_can_be_turned_off(monkeypatch):
    layer, fast = pair(8, 4)
    monkeypatch.setattr(cpu_kernels, "onednn_product", None)
    states = torch.randn(3, 8)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        assert torch.equal(fast(states), layer(states))


def test_what_a_linear_layer_refuses_is_refused_likewise():
    for layer in pair(8, 4):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.randn(3, 7))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(3, 8).double())


@pytest.mark.parametrize(
    "fields", [{"use_mem_delta_rule": True, **MODES[2]}, {"memory_write_gate": True, "attention_bias": True}]
)
def test_a_model_computes_what_it_did(fields, tmp_path):
    model, ids = tiny_model(**fields), random_ids(2, 13)
    fast = use_cpu_kernels(copy.deepcopy(model))
    losses = [one(ids, labels=ids, use_cache=False).loss for one in (model, fast)]
    gradients = [torch.autograd.grad(loss, list(one.parameters())) for loss, one in zip(losses, (model, fast))]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))

    assert fast.weights_fingerprint() == model.weights_fingerprint()
    fast.save_pretrained(tmp_path)
    loaded = InfiniForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is nn.Linear
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_computes_what_it_did(bias):
    mlp = LlamaMLP(tiny_config(mlp_bias=bias))
    fast = use_cpu_kernels(copy.deepcopy(nn.Sequential(mlp)))[0]
    assert type(fast) is CPUMLP
    states = torch.randn(2, 3, 24)
    with torch.no_grad():
        torch.testing.assert_close(fast(states), mlp(states))
        seen = []
        fast.gate_proj.register_forward_hook(lambda *_: seen.append("hook"))
        torch.testing.assert_close(fast(states), mlp(states))
    assert seen == ["hook"]
    torch.testing.assert_close(fast(states), mlp(states))
    gelu = LlamaMLP(tiny_config(hidden_act="gelu"))
    assert type(use_cpu_kernels(gelu)) is LlamaMLP


@pytest.mark.parametrize("part", ["gate_proj", "act_fn"])
def test_what_is_put_in_the_place_of_an_mlps_part_is_computed(part):
    mlp = LlamaMLP(tiny_config())
    fast = use_cpu_kernels(copy.deepcopy(nn.Sequential(mlp)))[0]
    states = torch.randn(2, 3, 24)
    for one in (mlp, fast):
        module = getattr(one, part)
        module.forward = lambda states, forward=module.forward: 2 * forward(states)
    with torch.no_grad():
        torch.testing.assert_close(fast(states), mlp(states))
        for one in (mlp, fast):
            one.act_fn = nn.GELU()
        torch.testing.assert_close(fast(states), mlp(states))


def test_merged_and_separate_adapters_are_those_of_the_model():
    model, ids = tiny_model(), random_ids(2, 13)
    config = LoraConfig(target_modules=["gate_proj", "o_proj"], init_lora_weights=False)
    adapted, fast = (
        get_peft_model(one, config).eval() for one in (copy.deepcopy(model), use_cpu_kernels(copy.deepcopy(model)))
    )
    fast.load_state_dict(adapted.state_dict())
    with torch.no_grad():
        expected = adapted(ids).logits
        for one in (fast, fast.merge_and_unload()):
            assert relative_error(one(ids).logits, expected) < 1e-5
    assert relative_error(model(ids).logits, expected) > 1e-2


def test_without_onednn_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no oneDNN: leave use_cpu_kernels"):
        use_cpu_kernels(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@fresh_cache()
def test_compiled_steps_generate_the_same(dtype):
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1, dtype=dtype, **MODES[2])
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    compiled = CompileConfig(fullgraph=True, mode="default")
    for length in (1, 13):
        ids = random_ids(1, length)
        expected = torch.stack(model.generate(ids, **options).logits)
        found = use_cpu_kernels(copy.deepcopy(model)).generate(ids, compile_config=compiled, **options)
        assert relative_error(torch.stack(found.logits), expected) < (1e-5 if dtype == torch.float32 else 0.05)
