"""
The options of a converted model's memory, each alone and all at once: which layers have one, the map of its features,
gates by token, and slots of exact keys and values.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_stream
from test_cache import assert_same_state, feed
from test_short_inputs import LLAMA, llama_and_ours
from test_streams import calls, check_against_reference
from tiny import (
    EVERY_OPTION,
    VOCABULARY,
    float64_weights,
    random_ids,
    relative_error,
    tiny_config,
    tiny_model,
)
from torch._dynamo.testing import CompileCounter

from infini_transformers.evaluation.losses import memory_off
from modeling_infini import InfiniCache, InfiniForCausalLM, memory_slots
from modeling_infini.cache import state_nbytes
from modeling_infini.cache_layer import InfiniCacheLayer


pytestmark = pytest.mark.usefixtures("small_passages")


N = 5
SLIDING = {"local_attention": "sliding"}
SLOTS = {**SLIDING, "num_memory_slots": 3}
ALL = {**EVERY_OPTION, "memory_layers": None}
OPTIONS = {
    "memory in one layer": {"memory_layers": [1]},
    "memory in no layer": {"memory_layers": [], **SLIDING},
    "exponential features": {"memory_feature_map": "exp"},
    "exponential features, delta rule": {"memory_feature_map": "exp", "use_mem_delta_rule": True},
    "exponential features, gated": {"memory_feature_map": "exp", "memory_write_gate": True},
    "gates by token": {"token_gates": True},
    "slots": SLOTS,
    "one slot": {**SLIDING, "num_memory_slots": 1},
    "more slots than a segment": {**SLIDING, "num_memory_slots": 7, "num_sink_tokens": 2},
    "slots in one layer": {**SLOTS, "slot_layers": [0], "num_sink_tokens": 1},
    "slots and memory in other layers": {**SLOTS, "slot_layers": [1], "memory_layers": [0], "num_sink_tokens": 1},
    "slots without memory": {**SLOTS, "memory_layers": []},
    "all": ALL,
    "all, in one layer": EVERY_OPTION,
}
every_option = pytest.mark.parametrize("fields", OPTIONS.values(), ids=OPTIONS)
WITH_MEMORY = {name: fields for name, fields in OPTIONS.items() if fields.get("memory_layers") != []}
WITH_SLOTS = {name: fields for name, fields in OPTIONS.items() if fields.get("num_memory_slots")}
every_kind_of_slots = pytest.mark.parametrize("fields", WITH_SLOTS.values(), ids=WITH_SLOTS)


@every_option
def test_prompts_and_the_steps_after_them_equal_the_reference(float64_norm_and_rope, fields):
    model, ids = tiny_model(torch.float64, **fields), random_ids(1, 3 * N + 2 + 2 * N + 1)
    expected, _ = reference_stream(ids[0].tolist(), float64_weights(model), model.config)
    with torch.no_grad():
        for length in (1, N - 1, N, N + 1, 3 * N + 2):
            assert relative_error(model(ids[:, :length], use_cache=False).logits[0], expected[:length]) < 1e-10
            found, _ = feed(model, ids, cuts=range(length, ids.shape[1]))
            assert relative_error(found[0], expected) < 1e-10


@pytest.mark.core
@every_option
@settings(max_examples=6)
@given(drawn=calls(N))
def test_cut_padded_and_packed_streams_equal_the_reference(float64_norm_and_rope, fields, drawn):
    check_against_reference(tiny_model(torch.float64, **fields), drawn, tolerance=1e-10, use_position_ids=True)


@pytest.mark.parametrize("scale", [1, 20], ids=["moderate", "clamped"])
@every_option
def test_gradients_equal_autograd_of_the_reference(float64_norm_and_rope, fields, scale):
    model, ids = tiny_model(torch.float64, **fields), random_ids(1, 4 * N + 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from the bounds of the maps, and beyond them.
            parameter.mul_(scale if "_map." in name else 1)
    probe = torch.randn(ids.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(0)).double()
    parameters = dict(model.named_parameters())
    weights = {name: weight.requires_grad_() for name, weight in float64_weights(copy.deepcopy(model)).items()}
    logits, _ = reference_stream(ids[0].tolist(), weights, model.config)
    of_parameters = [weights[name] for name in parameters]
    expected = torch.autograd.grad((logits * probe).sum(), of_parameters, materialize_grads=True, allow_unused=True)
    for cuts in ((), (N + 2, 2 * N, 2 * N + 1, 4 * N)):
        # Each of them has one, also where it is 0: that of the scores of slots.
        found = torch.autograd.grad((feed(model, ids, cuts=cuts)[0][0] * probe).sum(), list(parameters.values()))
        for name, mine, other in zip(parameters, found, expected):
            error = (mine - other).abs().max() / other.abs().max().clamp(min=1)
            assert error < 1e-9, (name, cuts, error)


@every_option
def test_gradient_checkpointing_changes_no_gradient(fields):
    model, ids = tiny_model(**fields), random_ids(2, 3 * N + 2)
    expected = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.train()
    model.gradient_checkpointing_enable()
    found = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_option
def test_short_inputs_give_the_base_models_logits(fields, dtype):
    llama, ours = llama_and_ours(dtype, **{**fields, **LLAMA})
    ids = random_ids(2, N)
    with torch.no_grad():
        expected = llama(ids).logits
        assert torch.equal(ours(ids, use_cache=False).logits, expected)
        assert torch.equal(ours(ids).logits, expected)


@pytest.mark.parametrize("fields", WITH_MEMORY.values(), ids=WITH_MEMORY)
def test_with_the_memory_off_a_model_is_the_conversion_without_it(fields):
    model, ids = tiny_model(**fields), random_ids(2, 5 * N + 3)
    local = {name: fields[name] for name in fields if name not in ("memory_layers", "num_memory_slots", "slot_layers")}
    plain = tiny_model(**{**local, "memory_feature_map": "elu", "token_gates": False})
    plain.load_state_dict(model.state_dict(), strict=False)
    cuts = (N + 1, 4 * N, *range(4 * N + 1, 5 * N + 3))
    with torch.no_grad():
        before = feed(model, ids)[0]
        with memory_off(plain), memory_off(model):
            assert torch.equal(model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
            assert torch.equal(feed(model, ids, cuts=cuts)[0], feed(plain, ids, cuts=cuts)[0])
        assert torch.equal(feed(model, ids)[0], before)


@pytest.mark.parametrize("steps", [False, True])
@every_option
def test_bfloat16_stays_near_float32(fields, steps):
    model, ids = tiny_model(**fields), random_ids(2, 33)
    cuts = range(1, 33) if steps else (7,)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A choice by scores of bfloat16 states is another one; with scores of 0, the latest tokens stay.
            parameter.copy_(parameter.bfloat16() * ("slot_score" not in name))
        expected, _ = feed(model, ids, cuts=cuts)
        found, cache = feed(model.bfloat16(), ids, cuts=cuts)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    kinds = {"keys": torch.bfloat16, "values": torch.bfloat16, "places": torch.long}
    for layer in cache.layers:
        for name, state in layer.states().items():
            assert state.dtype == kinds.get(name.split("_")[-1], torch.float32), name


def test_slots_chosen_in_bfloat16_stay_finite_and_of_the_text():
    model, ids = tiny_model(**ALL).bfloat16(), random_ids(2, 33)
    with torch.no_grad():
        logits, cache = feed(model, ids, cuts=(7, 8, 9))
    assert logits.isfinite().all()
    for layer in cache.layers:
        assert all(state.isfinite().all() for state in layer.states().values())
        assert layer.slot_places.min() > 0
        assert layer.slot_places.max() <= 30


def seen_by_hand(scores: list[float], position: int, config, radius: int) -> set[int]:
    """The tokens that the token at `position` sees, of a stream whose tokens have these scores."""
    start, sinks = position // N * N, config.num_sink_tokens
    window = range(max(0, position - N + 1), position + 1)
    means = []
    for segment in range(0, start, N):
        for token in range(segment, segment + N):
            near = scores[max(segment, token - radius) : min(segment + N, token + radius + 1)]
            means.append(sum(near) / len(near))
    ranked = sorted(range(sinks, start), key=lambda token: (means[token], token))
    return {*range(min(sinks, position + 1)), *window, *ranked[max(0, len(ranked) - config.num_memory_slots) :]}


@pytest.mark.core
@pytest.mark.parametrize("radius", [0, 1, 5])
@pytest.mark.parametrize("is_random", [True, False], ids=["random scores", "scores of 0"])
@pytest.mark.parametrize("num_memory_slots", [1, 3, 7, 3 * N])
@pytest.mark.parametrize("num_sink_tokens", [0, 2])
def test_a_token_sees_its_window_the_sinks_and_the_greatest_scores(
    monkeypatch, num_sink_tokens, num_memory_slots, is_random, radius
):
    monkeypatch.setattr(memory_slots, "RADIUS", radius)
    fields = {**SLOTS, "num_memory_slots": num_memory_slots, "num_sink_tokens": num_sink_tokens}
    model, ids = tiny_model(torch.float64, num_hidden_layers=1, **fields), random_ids(1, 4 * N + 2)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        # Of the two ways to a token of before, that of the matrix is shut.
        attention.head_gates.weight.fill_(1e4)
        attention.slot_score.weight.mul_(is_random)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    scores = attention.slot_score(model.model.layers[0].input_layernorm(embeddings))
    scores = scores[0, :, 0].bfloat16().tolist()
    for cuts in ((), (1, N + 2, 2 * N, 2 * N + 1, 2 * N + 2, 4 * N)):
        cache, parts = InfiniCache(model.config), []
        for part in embeddings.tensor_split(cuts, 1):
            parts.append(model(inputs_embeds=part, past_key_values=cache).logits)
        for position, logits in enumerate(torch.cat(parts, 1)[0]):
            (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings, retain_graph=True)
            seen = gradient[0].abs().sum(-1).nonzero()[:, 0].tolist()
            assert set(seen) == seen_by_hand(scores, position, model.config, radius), (cuts, position)


@every_kind_of_slots
def test_distances_stay_within_the_longest(monkeypatch, fields):
    model, positions = tiny_model(torch.float64, **fields), []
    rope = model.model.rotary_emb.forward
    monkeypatch.setattr(
        model.model.rotary_emb, "forward", lambda states, places: positions.append(places) or rope(states, places)
    )
    with torch.no_grad():
        feed(model, random_ids(1, 6 * N), cuts=(N, 2 * N + 1))
    longest = torch.cat([places.flatten() for places in positions])
    assert longest.max() - longest.min() < model.config.longest_distance
    sinks, slots = fields.get("num_sink_tokens", 0), fields["num_memory_slots"]
    assert model.config.longest_distance == 2 * N + slots + sinks


@pytest.mark.core
@every_option
def test_the_state_is_of_constant_size(fields):
    model, sizes = tiny_model(**fields), set()
    config = model.config
    cache = InfiniCache(config)
    with torch.no_grad():
        for seed, length in enumerate((1, 3, 1, 40, 7, 1)):
            model(random_ids(2, length, seed=seed), past_key_values=cache)
            states = [state for layer in cache.layers for state in layer.states().values()]
            sizes.add(sum(state.nbytes for state in states))
            # No state is a view of something larger.
            storages = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for state in states}
            assert sum(storages.values()) == sum(state.nbytes for state in states)
    assert sizes == {2 * state_nbytes(config)}

    heads, dim, slots = config.num_key_value_heads, config.head_dim, config.num_memory_slots
    of_window = 2 * heads * (config.num_sink_tokens + N) * dim * 4
    features = dim * (2 if config.memory_feature_map == "exp" else 1)
    of_memory = 2 * heads * features * (dim + 1) * 4
    of_slots = slots * (2 * heads * dim * 4 + 4 + 8) + (slots > 0) * (config.num_sink_tokens + N) * 4
    with_memory, with_slots = (
        2 if layers is None else len(layers) for layers in (config.memory_layers, config.slot_layers)
    )
    assert state_nbytes(config) == 2 * of_window + with_memory * of_memory + with_slots * of_slots


def test_layers_without_memory_have_neither_its_weights_nor_its_state():
    model, ids = tiny_model(torch.float64, **EVERY_OPTION), random_ids(1, 3 * N + 2)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "layers.0." in name and ("gates" in name or "memory" in name)]
    assert [name for name in names if "layers.1." in name and ("gates" in name or "memory" in name)]
    assert not hasattr(model.model.layers[0].self_attn, "memory")
    shares = model.local_shares()
    assert shares.shape == (2, 4)
    assert (shares[0] == 1).all()
    assert (shares[1] < 1).all()
    with torch.no_grad():
        _, cache = feed(model, ids, cuts=(2 * N,))
    assert cache.layers[0].states().keys() == {"keys", "values", *InfiniCacheLayer.SLOT_STATES}
    assert cache.layers[1].states().keys() > {"keys", "values", "memory"}
    with torch.no_grad():
        expected, _ = reference_stream(ids[0].tolist(), float64_weights(model), model.config)
        assert relative_error(model(ids).logits[0], expected) < 1e-5


def test_new_weights_start_as_they_should():
    model = InfiniForCausalLM(tiny_config(**ALL, head_gate_init_value=2.0))
    for layer in model.model.layers:
        memory = layer.self_attn.memory
        for name, heads in (("query_map", 4), ("key_map", 2)):
            feature_map = memory.get_submodule(name)
            torch.testing.assert_close(feature_map.weight.data, 0.7 * torch.eye(6).expand(heads, -1, -1))
            assert torch.equal(feature_map.bias.data, torch.zeros(heads, 6))
        assert memory.token_gate.weight.shape == (4, 24)
        assert layer.self_attn.slot_score.weight.shape == (1, 24)
        assert not memory.token_gate.weight.any()
        assert not layer.self_attn.slot_score.weight.any()
        assert memory.token_gate.bias is None
        assert layer.self_attn.slot_score.bias is None
    torch.testing.assert_close(model.local_shares(), torch.full((2, 4), 2.0).sigmoid())


@pytest.mark.core
@every_kind_of_slots
def test_cropping_across_the_end_of_a_segment_restores_the_slots(fields):
    model = tiny_model(torch.float64, **fields)
    ids, other = random_ids(2, 2 * N + 3), random_ids(2, N, seed=1)
    with torch.no_grad():
        _, cache = feed(model, ids)
        cache.activate_past_recording()
        for steps in (False, True):
            feed(model, other, cache, cuts=range(1, N) if steps else ())
            cache.crop(-N)
            assert_same_state(cache, feed(model, ids)[1], 1e-12)
        more = random_ids(2, 2 * N + 1, seed=2)
        found, _ = feed(model, more, cache, cuts=(1, 2, 3))
        expected, _ = feed(model, torch.cat([ids, more], 1))
    assert relative_error(found, expected[:, 2 * N + 3 :]) < 1e-5


@every_kind_of_slots
def test_beams_and_drafts_generate_what_they_should(fields):
    model, ids = tiny_model(torch.float64, **fields), random_ids(2, 2 * N + 2)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 2 * N + 1, "do_sample": False}
    for more in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        found, expected = (model.generate(ids, use_cache=cached, **options, **more) for cached in (True, False))
        assert torch.equal(found, expected)
    assistant, options = tiny_model(torch.float64, seed=1), {"max_new_tokens": 3 * N, "do_sample": False}
    assistant.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="constant")
    for more in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        assert torch.equal(model.generate(ids[:1], **options, **more), model.generate(ids[:1], **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_option
def test_a_saved_memory_goes_on_bit_for_bit(tmp_path, fields, dtype):
    tiny_model(**fields).save_pretrained(tmp_path / "model")
    model = InfiniForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    ids, mask = random_ids(2, 4 * N + 2), torch.ones(2, 4 * N + 2)
    mask[1, :N] = 0
    with torch.no_grad():
        _, cache = feed(model, ids, cuts=(2 * N + 1, 2 * N + 2), attention_mask=mask)
        cache.save_pretrained(tmp_path / "memory")
        again = InfiniForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
        loaded = InfiniCache.from_pretrained(tmp_path / "memory", again)
        assert loaded.state_dict().keys() == cache.state_dict().keys()
        assert all(torch.equal(state, loaded.state_dict()[name]) for name, state in cache.state_dict().items())
        more = random_ids(2, 2 * N + 3, seed=1)
        cuts = range(N, 2 * N)
        assert torch.equal(feed(again, more, loaded, cuts=cuts)[0], feed(model, more, cache, cuts=cuts)[0])


@pytest.mark.parametrize(
    "other",
    [
        {"memory_layers": [0, 1]},
        {"memory_feature_map": "elu"},
        {"token_gates": False},
        {"num_memory_slots": 0, "slot_layers": None},
        {"num_memory_slots": 4},
        {"slot_layers": [0]},
    ],
    ids=str,
)
def test_a_memory_made_with_other_options_is_refused(tmp_path, other):
    model, name = tiny_model(**EVERY_OPTION), next(iter(other))
    _, cache = feed(model, random_ids(1, 2 * N))
    cache.save_pretrained(tmp_path)
    other_model = tiny_model(**{**EVERY_OPTION, **other})
    with pytest.raises(ValueError, match=f"belongs to another model: it was made with {name}="):
        InfiniCache.from_pretrained(tmp_path, other_model)
    with pytest.raises(ValueError, match=f"belongs to another model: it was made with {name}="):
        other_model(random_ids(1, 1, seed=1), past_key_values=cache)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", ["slots", "all", "all, in one layer"])
def test_a_decode_step_compiles_once_whatever_was_read(name, batch_size):
    torch._dynamo.reset()
    model, ids = tiny_model(**OPTIONS[name]), random_ids(batch_size, 6 * N)
    counter = CompileCounter()
    with torch.no_grad():
        expected = model(ids).logits
        _, cache = feed(model, ids[:, : N + 2])
        step = torch.compile(model.forward, backend=counter, fullgraph=True)
        logits = [step(token, past_key_values=cache).logits for token in ids[:, N + 2 :].split(1, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, N + 2 :], atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


class TestRefusals:
    """Of slots, what has no meaning with them."""

    def test_attention_weights(self):
        model, ids = tiny_model(**SLOTS), random_ids(1, 2 * N)
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="num_memory_slots=3"):
            model(ids, output_attentions=True)
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="num_memory_slots=3"):
            model(ids)

    def test_flash_attention(self):
        model = tiny_model(**SLOTS)
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="num_memory_slots=3"):
            model(random_ids(1, 2 * N))

    def test_attention_over_segments(self):
        with pytest.raises(Exception, match="num_memory_slots=3"):
            tiny_config(local_attention="segment", num_memory_slots=3)


@every_option
@settings(max_examples=4)
@given(rows=st.lists(st.integers(0, 2), min_size=1, max_size=4), length=st.sampled_from([1, N, 3 * N + 2]))
def test_rows_that_are_selected_go_on_as_their_own_streams(fields, rows, length):
    model, ids, mask = tiny_model(torch.float64, **fields), random_ids(3, length + 1), torch.ones(3, length + 1)
    mask[1, : length // 2] = mask[2, -1] = 0
    more = random_ids(len(rows), 2 * N + 1, seed=1)
    with torch.no_grad():
        _, cache = feed(model, ids, attention_mask=mask)
        cache.batch_select_indices(torch.tensor(rows))
        found, _ = feed(model, more, cache, cuts=(1, 2))
        for index, row in enumerate(rows):
            own = ids[row : row + 1][mask[row : row + 1] == 1].unsqueeze(0)
            expected, _ = feed(model, torch.cat([own, more[index : index + 1]], 1))
            assert relative_error(found[index], expected[0, own.shape[1] :]) < 1e-5
