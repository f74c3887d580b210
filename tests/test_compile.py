"""
torch.compile of whole texts. Of a decode step, see `test_a_decode_step_compiles_once_whatever_was_read`; of a training
step, `test_without_padding_a_step_compiles_to_one_graph` and `test_a_compiled_step_is_the_step`.
"""

import copy

import pytest
import torch
from tiny import EVERY_OPTION, MODES, random_ids, relative_error, tiny_model
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import fresh_cache
from transformers import CompileConfig

from modeling_infini import InfiniCache


N = 5


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()


ALL = {**EVERY_OPTION, "num_hidden_layers": 2}


def compact_model(**fields):
    return tiny_model(**{"num_hidden_layers": 1, "use_mem_delta_rule": True, **MODES[2], **fields})


@pytest.mark.parametrize("fields", [{}, ALL], ids=["delta", "all"])
def test_texts_of_as_many_segments_share_one_graph(fields):
    model, counter, graphs = compact_model(**fields), CompileCounter(), []
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in (2 * N + 2, 2 * N + 4, 2 * N + 3, 2 * N + 1, 3 * N + 2):
            ids = random_ids(2, length)
            found = compiled(ids, use_cache=False).logits
            assert relative_error(found, model(ids, use_cache=False).logits) < 1e-5
            graphs.append(counter.frame_count)
    # Once for the first length, once for any of three segments, and once for four segments.
    assert graphs == [1, 2, 2, 2, 3]


def test_reading_into_a_cache_breaks_the_graph_but_not_the_result():
    model, ids, counter = compact_model(), random_ids(2, 4 * N + 3), CompileCounter()
    compiled, cache = torch.compile(model, backend=counter), InfiniCache(model.config)
    with torch.no_grad():
        expected = model(ids).logits
        parts = [3 * N + 2, N - 1, 1, 1]
        found = [compiled(part, past_key_values=cache).logits for part in ids.split(parts, 1)]
    assert relative_error(torch.cat(found, 1), expected) < 1e-5
    assert counter.frame_count > len(parts)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("delta", "fields"), [(False, MODES[0]), (True, MODES[2]), (True, ALL)])
def test_generate_compiles_one_step_for_all_prompts(fields, delta, batch_size):
    model, graphs = tiny_model(**{"num_hidden_layers": 1, "use_mem_delta_rule": delta, **fields}), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    options = {"max_new_tokens": 2 * N, "do_sample": False}
    for length in (2, N, 2 * N + 2, 4 * N):
        ids = random_ids(batch_size, length)
        compiled = CompileConfig(fullgraph=True, backend=backend, mode=None)
        assert torch.equal(model.generate(ids, compile_config=compiled, **options), model.generate(ids, **options))
    assert len(graphs) == 1


def test_what_generate_cannot_compile_is_not():
    model, ids = tiny_model(), random_ids(1, 7)

    def backend(graph, example_inputs):
        raise AssertionError("compiled")

    compiled = CompileConfig(backend=backend, mode=None)
    options = {"max_new_tokens": 3, "do_sample": False, "compile_config": compiled}
    recording = InfiniCache(model.config)
    recording.activate_past_recording()
    model.generation_config.num_assistant_tokens = 3
    for option in (
        {"use_cache": False},
        {"disable_compile": True},
        {"past_key_values": recording},
        {"assistant_model": tiny_model(seed=1)},
    ):
        model.generate(ids, **options, **option)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    model.generate(ids, **options)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, ALL], ids=["delta", "all"])
@fresh_cache()
def test_inductor_computes_texts_gradients_and_decode_steps(fields):
    model, ids = compact_model(**fields).train(), random_ids(2, 3 * N + 2)
    expected = model(ids, labels=ids, use_cache=False)
    gradients = torch.autograd.grad(expected.loss, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    found = compiled(input_ids=ids, labels=ids, use_cache=False)
    assert relative_error(found.logits, expected.logits) < 1e-5
    found = torch.autograd.grad(found.loss, list(model.parameters()))
    torch.testing.assert_close(found, gradients, atol=1e-5, rtol=1e-4)

    model.eval()
    caches = [InfiniCache(model.config)]
    with torch.no_grad():
        model(ids, past_key_values=caches[0])
        caches.append(copy.deepcopy(caches[0]))
        step = torch.compile(model.forward, fullgraph=True)
        for token in random_ids(2, N + 2, seed=1).split(1, 1):
            logits = [call(token, past_key_values=cache).logits for call, cache in zip((model, step), caches)]
            assert relative_error(logits[1], logits[0]) < 1e-4
    for layers in zip(*(cache.layers for cache in caches)):
        if layers[0].has_slots:
            assert torch.equal(*(layer.slot_places for layer in layers))
            scores = layers[1].token_scores
            assert torch.equal(scores.bfloat16().float(), scores)


def test_padding_and_a_used_cache_break_a_graph_once_or_twice():
    model, ids = compact_model(), random_ids(2, 3 * N + 2)
    padded = torch.ones_like(ids)
    padded[0, :N] = 0
    positions = torch.cat([torch.arange(2 * N), torch.arange(N + 2)]).expand_as(ids)
    with torch.no_grad():
        for inputs, most in (
            ({}, 1),
            ({"use_cache": False}, 1),
            ({"attention_mask": padded}, 3),
            ({"position_ids": positions}, 3),
            ({"attention_mask": padded, "position_ids": torch.arange(3 * N + 2).expand_as(ids)}, 3),
            ({"past_key_values": model(ids).past_key_values}, 4),
        ):
            torch._dynamo.reset()
            assert torch._dynamo.explain(model)(ids, **inputs).graph_count <= most, inputs.keys()


def test_a_compiled_step_starts_a_document_where_the_mask_numbers_one():
    model, ids = compact_model(), random_ids(2, 2 * N + 3)
    numbers = torch.ones_like(ids)
    numbers[0, -1] = 2
    with torch.no_grad():
        expected = model(ids, attention_mask=numbers).logits[:, -1:]
        cache = model(ids[:, :-1]).past_key_values
        step = torch.compile(model.forward, backend="eager", fullgraph=True)
        found = step(ids[:, -1:], attention_mask=numbers, past_key_values=cache).logits
    assert relative_error(found, expected) < 1e-5
    assert cache.tokens_read.tolist() == [1, 2 * N + 3]


@pytest.mark.parametrize("fields", [MODES[0], MODES[2]], ids=["segment", "sliding"])
def test_a_compiled_step_leaves_what_gradients_need(fields):
    model = tiny_model(**fields)
    length = model.config.segment_length
    texts, token = [random_ids(2, length, seed=seed) for seed in range(2)], random_ids(2, 1)

    def gradients_and_logits(step):
        model.zero_grad()
        cache = InfiniCache(model.config)
        loss = model(texts[0], past_key_values=cache).logits.square().sum()
        with torch.no_grad():
            logits = step(token, past_key_values=cache.detached()).logits
            step(token, past_key_values=cache)
        (loss + model(texts[1], past_key_values=cache).logits.square().sum()).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), logits

    step = torch.compile(model.forward, backend="eager")
    for found, expected in zip(gradients_and_logits(step), gradients_and_logits(model)):
        assert relative_error(found, expected) < 1e-5


def test_a_compiled_call_refuses_the_memory_of_other_weights():
    model, ids = compact_model(), random_ids(2, N + 2)
    with torch.no_grad():
        cache = model(ids).past_key_values
        torch.compile(model, backend="eager")(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="belongs to other weights"):
            torch.compile(compact_model(seed=1), backend="eager")(ids, past_key_values=cache)
