"""The penalty on writes: what it is, and that any trainer's gradients have it."""

import pytest
import torch
from tiny import random_ids, tiny_model
from torch.nn.functional import logsigmoid

from modeling_infini.training import backpropagate, sparse_writes, write_sparsity
from modeling_infini.training.write_sparsity import write_penalty


WEIGHT, MARGIN = 0.7, 1.5


def gated_model(**fields):
    return tiny_model(torch.float64, memory_write_gate=True, segment_length=4, **fields).train()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_penalty_is_the_mean_distance_from_the_best_remembered_token():
    log_gates = torch.tensor([[-1.0, -2.0, -30.0], [-5.0, -5.0, -4.0]]).unsqueeze(-1)
    # Below the maximum by 0, 1 and 29, and by 1, 1 and 0.
    assert write_penalty(log_gates, 10.0).item() == pytest.approx((10 + 9 + 0 + 9 + 9 + 10) / 6)


@pytest.mark.usefixtures("float64_norm_and_rope")
def test_backward_adds_the_gradient_of_the_penalty():
    model, ids = gated_model(), random_ids(2, 11)
    model(ids, labels=ids).loss.backward()
    plain = gradients(model)

    seen = []
    layers = [layer.self_attn for layer in model.model.layers]
    hooks = [
        layer.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["hidden_states"]), with_kwargs=True)
        for layer in layers
    ]
    model(ids, labels=ids)
    for hook in hooks:
        hook.remove()
    penalty = sum(
        write_penalty(logsigmoid(states @ layer.memory.write_gate.weight.T + layer.memory.write_gate.bias), MARGIN)
        for layer, states in zip(layers, seen)
    )
    (WEIGHT * penalty).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain[name] += parameter.grad
    model.zero_grad()

    with sparse_writes(model, WEIGHT, MARGIN):
        loss = model(ids, labels=ids).loss
        loss.backward()
    found = gradients(model)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], msg=name)

    model(ids, labels=ids).loss.backward()
    assert any(not torch.equal(gradient, found[name]) for name, gradient in gradients(model).items())


def test_chunks_that_run_backward_by_themselves_have_it_too():
    model, ids = gated_model(), random_ids(1, 24)
    inputs = {"input_ids": ids, "labels": ids}
    backpropagate(model, inputs, chunk_segments=2)
    plain = gradients(model)
    with sparse_writes(model, WEIGHT):
        backpropagate(model, inputs, chunk_segments=2)
    found = gradients(model)
    name = "model.layers.0.self_attn.memory.write_gate.bias"
    assert (found[name] > plain[name]).all()


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_token_weighs_as_much_in_chunks_as_in_one_pass(monkeypatch, is_checkpointed):
    # Without the maximum, which is that of a chunk, the penalty is a mean over tokens alone.
    monkeypatch.setattr(write_sparsity, "write_penalty", lambda log_gates, margin: log_gates.mean())
    model, ids = gated_model(), random_ids(1, 27)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    inputs = {"input_ids": ids, "labels": ids}
    with sparse_writes(model, WEIGHT):
        backpropagate(model, inputs)
        expected = gradients(model)
        for options in ({"chunk_segments": 2}, {"chunk_segments": 1}):
            backpropagate(model, inputs, **options)
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(gradient, expected[name], msg=name, rtol=1e-5, atol=1e-6)


def test_what_is_not_training_is_left_alone():
    model, ids = gated_model().eval(), random_ids(1, 9)
    expected = model(ids).logits
    with sparse_writes(model, WEIGHT):
        assert torch.equal(model(ids).logits, expected)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)


def test_a_model_without_write_gates_is_refused():
    with pytest.raises(TypeError, match="memory_write_gate=True"), sparse_writes(tiny_model(), WEIGHT):
        pass


def test_a_model_without_layers_that_write_is_refused_by_another_sentence():
    model = gated_model(memory_layers=[])
    with (
        pytest.raises(TypeError, match=r"no layer with a memory \(memory_layers=\[\]\)"),
        sparse_writes(model, WEIGHT),
    ):
        pass


def test_a_model_that_was_compiled_before_has_it_too():
    model, ids = gated_model(), random_ids(1, 9)
    compiled = torch.compile(model, backend="eager")
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    gradients(model)
    with sparse_writes(model, WEIGHT):
        model(ids, labels=ids, use_cache=False).loss.backward()
        expected = gradients(model)
        compiled(ids, labels=ids, use_cache=False).loss.backward()
        found = gradients(model)
    name = "model.layers.0.self_attn.memory.write_gate.bias"
    torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("arguments", [(-1.0, 20.0), (1.0, -1.0), (float("nan"), 20.0)])
def test_a_pressure_to_write_more_is_refused(arguments):
    with pytest.raises(ValueError, match="must not be negative"), sparse_writes(gated_model(), *arguments):
        pass
