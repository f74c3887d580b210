"""P2 (the same state), P4 (of constant size), P7 (independent forks), and gradients through the cache."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_stream
from tiny import MODES, config_fields, float64_weights, hurting_lengths, random_ids, relative_error, tiny_model
from transformers import DynamicCache

from modeling_infini import InfiniCache
from modeling_infini.cache import CACHE_NAME


pytestmark = pytest.mark.usefixtures("small_passages")


def feed(model, ids, cache=None, cuts=(), **inputs):
    """Feeds `ids` in calls cut at `cuts`; logits of all."""
    cache = InfiniCache(model.config) if cache is None else cache
    edges = [0, *sorted(cuts), ids.shape[1]]
    logits = []
    for start, end in pairwise(edges):
        call = {name: states[:, start:end] for name, states in inputs.items()}
        logits.append(model(ids[:, start:end], past_key_values=cache, **call).logits)
    return torch.cat(logits, 1), cache


def live_states(cache):
    """The states that a next token can see, with dead slots of the rings zeroed."""
    config, states = cache.config, {}
    length, sinks = config.segment_length, config.num_sink_tokens
    read = cache.tokens_read.unsqueeze(1)
    slots = torch.arange(length)
    in_segment = slots < read % length
    was_written = (read - 1 - slots) // length * length + slots >= 0
    in_window = was_written & (read > 0)
    is_live = torch.cat([torch.arange(sinks) < read, in_window if config.is_sliding else in_segment], 1)
    for name, state in cache.state_dict().items():
        kind = name.split(".")[-1]
        if kind in ("keys", "values"):
            state = state * is_live[:, None, :, None]
        elif kind == "slot_columns":
            state = state * is_live
        states[name] = state
    return states


def assert_same_state(found, expected, tolerance=1e-9):
    for (name, state), other in zip(live_states(found).items(), live_states(expected).values()):
        torch.testing.assert_close(state, other, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert found.get_seq_length() == expected.get_seq_length()


@pytest.mark.core
@given(st.data())
def test_cuts_change_neither_logits_nor_state(data):
    fields = data.draw(config_fields())
    model = tiny_model(torch.float64, **fields)
    length = data.draw(hurting_lengths(fields["segment_length"])) + data.draw(
        hurting_lengths(fields["segment_length"])
    )
    ids = random_ids(2, length)
    cuts = data.draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
    mask = torch.ones_like(ids)
    if data.draw(st.booleans()):
        mask[0, data.draw(st.lists(st.integers(0, length - 1)))] = 0
    with torch.no_grad():
        expected, whole = feed(model, ids, attention_mask=mask)
        found, cut = feed(model, ids, cuts=cuts, attention_mask=mask)
    assert relative_error(found[mask == 1], expected[mask == 1]) < 1e-5 if mask.any() else True
    assert_same_state(cut, whole, tolerance=1e-5)


@pytest.mark.core
@given(st.data())
def test_cuts_do_not_change_gradients(float64_norm_and_rope, data):
    fields = data.draw(config_fields())
    model = tiny_model(torch.float64, **fields)
    length = data.draw(hurting_lengths(fields["segment_length"])) + 1
    ids, probe = random_ids(2, length), torch.randn(2, length, 31).double()
    mask = torch.ones_like(ids)
    mask[0, : data.draw(st.integers(0, length - 1))] = 0
    cuts = data.draw(st.sets(st.integers(1, length - 1)))

    def gradients(logits):
        loss = (logits * probe * mask.unsqueeze(-1)).sum()
        return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)

    expected = gradients(model(ids, attention_mask=mask, use_cache=False).logits)
    found = gradients(feed(model, ids, cuts=cuts, attention_mask=mask)[0])
    for mine, other in zip(found, expected):
        torch.testing.assert_close(mine, other)


@pytest.mark.core
@pytest.mark.parametrize("fields", MODES)
@pytest.mark.parametrize("delta", [False, True])
def test_gradients_equal_autograd_of_the_reference(float64_norm_and_rope, fields, delta):
    model = tiny_model(torch.float64, use_mem_delta_rule=delta, segment_length=3, **fields)
    ids, probe = random_ids(1, 11), torch.randn(11, 31).double()
    parameters = dict(model.named_parameters())
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in float64_weights(model).items()}
    found = torch.autograd.grad((model(ids).logits[0] * probe).sum(), list(parameters.values()))
    reference, _ = reference_stream(ids[0].tolist(), weights, model.config)
    expected = torch.autograd.grad((reference * probe).sum(), [weights[name] for name in parameters])
    for name, mine, other in zip(parameters, found, expected):
        torch.testing.assert_close(mine, other, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.core
@pytest.mark.parametrize("fields", MODES)
def test_size_does_not_depend_on_what_was_read(fields):
    model, sizes = tiny_model(**fields), set()
    cache = InfiniCache(model.config)
    with torch.no_grad():
        for length in (1, 3, 1, 40, 7, 1):
            model(random_ids(2, length), past_key_values=cache)
            sizes.add(cache.nbytes)
            storages = {
                s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in cache.state_dict().values()
            }
            assert sum(storages.values()) == sum(s.nbytes for s in cache.state_dict().values())
    assert len(sizes) == 1


@pytest.mark.core
@given(st.data())
def test_reordered_repeated_and_selected_rows_continue_as_their_own_streams(data):
    fields = data.draw(config_fields())
    model = tiny_model(torch.float64, **fields)
    ids = random_ids(3, data.draw(hurting_lengths(fields["segment_length"])))
    mask = torch.ones_like(ids)
    mask[1, : ids.shape[1] // 2] = 0
    more = random_ids(6, data.draw(hurting_lengths(fields["segment_length"])), seed=1)
    operation = data.draw(st.sampled_from(["reorder", "select", "repeat"]))
    rows = {
        "reorder": torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3))),
        "select": torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))),
        "repeat": torch.arange(3).repeat_interleave(2),
    }[operation]
    with torch.no_grad():
        _, cache = feed(model, ids, attention_mask=mask)
        if data.draw(st.booleans()):
            cache.activate_past_recording()
        before = copy.deepcopy(cache)
        if operation == "reorder":
            cache.reorder_cache(rows)
        elif operation == "select":
            cache.batch_select_indices(rows)
        else:
            cache.batch_repeat_interleave(2)
        more = more[: len(rows)]
        found, _ = feed(model, more, cache, cuts=(1,) if more.shape[1] > 1 else ())
        for index, row in enumerate(rows):
            alone = copy.deepcopy(before)
            alone.batch_select_indices(row.unsqueeze(0))
            expected, _ = feed(model, more[index : index + 1], alone)
            torch.testing.assert_close(found[index], expected[0], atol=1e-5, rtol=1e-5)
    assert_same_state(before, feed(model, ids, attention_mask=mask)[1])


@pytest.mark.core
@given(st.data())
def test_cropping_gives_the_stream_without_what_was_cropped(data):
    fields = data.draw(config_fields())
    n = fields["segment_length"]
    model = tiny_model(torch.float64, **fields)
    cache = InfiniCache(model.config)
    kept_ids, kept_mask = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    start = data.draw(st.integers(0, 2 * n + 1))
    with torch.no_grad():
        for step in range(data.draw(st.integers(1, 4))):
            if step == 0 and start > 0:
                kept_ids, kept_mask = random_ids(2, start, seed=9), torch.ones(2, start, dtype=torch.long)
                feed(model, kept_ids, cache)
            cache.activate_past_recording()
            ids = random_ids(2, data.draw(hurting_lengths(n)), seed=step)
            mask = torch.ones_like(ids)
            mask[1, data.draw(st.lists(st.integers(0, ids.shape[1] - 1), max_size=2))] = 0
            cuts = {t for t in range(1, ids.shape[1]) if data.draw(st.booleans())}
            feed(model, ids, cache, cuts=cuts, attention_mask=mask)
            kept_ids, kept_mask = torch.cat([kept_ids, ids], 1), torch.cat([kept_mask, mask], 1)
            # What one crop has taken back is no longer there for the next.
            count = data.draw(st.integers(0, min(n, cache.recording.length)))
            cache.crop(-count)
            kept_ids = kept_ids[:, : kept_ids.shape[1] - count]
            kept_mask = kept_mask[:, : kept_ids.shape[1]]
            assert cache.get_seq_length() == kept_ids.shape[1]
            assert cache.tokens_read.tolist() == kept_mask.sum(1).tolist()
        more = random_ids(2, data.draw(hurting_lengths(n)), seed=7)
        expected = feed(model, torch.cat([kept_ids, more], 1), attention_mask=torch.cat([kept_mask, more * 0 + 1], 1))
        found, _ = feed(model, more, cache)
    torch.testing.assert_close(found, expected[0][:, -more.shape[1] :], atol=1e-5, rtol=1e-5)
    assert_same_state(cache, expected[1], tolerance=1e-5)


def test_cropping_goes_back_over_the_start_of_a_document():
    model, ids = tiny_model(torch.float64, local_attention="sliding", num_sink_tokens=2), random_ids(1, 12)
    cache, more = InfiniCache(model.config), random_ids(1, 9, seed=1)
    cache.activate_past_recording()
    with torch.no_grad():
        feed(model, ids, cache)
        feed(model, random_ids(1, 4, seed=2), cache, position_ids=torch.arange(4).unsqueeze(0))
        assert cache.tokens_read.item() == 4
        cache.crop(-4)
        found, _ = feed(model, more, cache)
        expected, _ = feed(model, torch.cat([ids, more], 1))
    torch.testing.assert_close(found, expected[:, 12:], atol=1e-5, rtol=1e-5)


@pytest.mark.core
def test_what_was_not_recorded_cannot_be_cropped():
    model = tiny_model()
    with torch.no_grad():
        _, cache = feed(model, random_ids(1, 9))
        with pytest.raises(ValueError, match=r"Cannot take back 1 columns: the cache has recorded 0.*activate_past"):
            cache.crop(-1)
        cache.activate_past_recording()
        feed(model, random_ids(1, 30), cache, cuts=range(1, 30))
        before = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="Cannot take back 6 columns: the cache has recorded 5"):
            cache.crop(-6)
        with pytest.raises(ValueError, match="minus the number"):
            cache.crop(3)
        assert_same_state(cache, before)
        cache.crop(0)
        cache.crop(-5)
    assert cache.get_seq_length() == 34


def test_recording_is_bounded():
    model = tiny_model()
    cache, sizes = InfiniCache(model.config), []
    cache.activate_past_recording()
    with torch.no_grad():
        for step in range(60):
            model(random_ids(1, 1 + step % 3), past_key_values=cache)
            sizes.append(cache.nbytes)
    assert max(sizes[40:]) <= max(sizes[:40])


@pytest.mark.core
def test_copies_are_independent():
    model = tiny_model(local_attention="sliding", num_sink_tokens=1)
    with torch.no_grad():
        _, cache = feed(model, random_ids(2, 8))
        twin = copy.deepcopy(cache)
        feed(model, random_ids(2, 7, seed=1), cache, cuts=range(1, 7))
        assert_same_state(twin, feed(model, random_ids(2, 8))[1])


def test_a_cache_that_carries_gradients_can_be_copied():
    model, ids = tiny_model(torch.float64), random_ids(2, 7)
    cache = InfiniCache(model.config)
    cache.activate_past_recording()
    feed(model, ids, cache)
    twin = copy.deepcopy(cache)
    more = random_ids(2, 8, seed=1)
    expected = torch.autograd.grad(feed(model, more, cache)[0].sum(), model.lm_head.weight, retain_graph=True)
    found = torch.autograd.grad(feed(model, more, twin)[0].sum(), model.lm_head.weight)
    torch.testing.assert_close(found, expected)
    twin.crop(-3)
    assert (twin.get_seq_length(), cache.get_seq_length()) == (12, 15)


def test_a_cache_goes_by_both_of_its_names():
    model, ids = tiny_model(), random_ids(2, 20)
    caches = {name: InfiniCache(model.config) for name in ("past_key_values", "cache")}
    with torch.no_grad():
        for part in (ids[:, :13], ids[:, 13:]):
            logits = [model(part, **{name: cache}).logits for name, cache in caches.items()]
            hidden = [model.model(part, **{name: copy.deepcopy(cache)})[0] for name, cache in caches.items()]
            assert torch.equal(*logits)
            assert torch.equal(*hidden)
        assert_same_state(*caches.values())
        for forward in (model, model.model):
            with pytest.raises(ValueError, match="two names of the same"):
                forward(ids, **caches)
    assert CACHE_NAME in model(ids, use_cache=True)
    if CACHE_NAME != "cache":
        with pytest.raises(ValueError, match="takes a cache as past_key_values="):
            model.generate(ids, cache=caches["cache"])


def test_an_interrupted_call_is_not_taken_for_a_read_one(tmp_path):
    model, ids = tiny_model(), random_ids(1, 20)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        _, cache = feed(model, ids[:, :7])
        with pytest.raises(ValueError, match=r"position_ids must be of shape \(batch=1, columns\)"):
            model(ids[:, 7:], position_ids=torch.zeros(3, 13), past_key_values=cache)
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 7:], past_key_values=cache)
        hook.remove()
        for use in (
            lambda: model(ids[:, 7:], past_key_values=cache),
            lambda: cache.save_pretrained(tmp_path / "memory"),
            lambda: cache.crop(-1),
        ):
            with pytest.raises(RuntimeError, match="was interrupted"):
                use()
        assert not (tmp_path / "memory").exists()
        cache.reset()
        assert torch.equal(feed(model, ids, cache)[0], feed(model, ids)[0])


def test_recording_ends_and_begins_again_as_generate_does_it():
    model, ids = tiny_model(torch.float64), random_ids(2, 20)
    with torch.no_grad():
        cache = InfiniCache(model.config)
        cache.activate_past_recording()
        feed(model, ids[:, :7], cache)
        for layer in cache.layers:
            layer.record_past = False
        with pytest.raises(ValueError, match="has recorded 0"):
            cache.crop(-1)
        feed(model, ids[:, 7:9], cache)
        for layer in cache.layers:
            layer.record_past = False
        cache.activate_past_recording()
        feed(model, ids[:, 9:], cache)
        cache.crop(-4)
        assert_same_state(cache, feed(model, ids[:, :16])[1])


def test_rows_selected_in_inference_mode_go_on_outside():
    model = tiny_model()
    with torch.no_grad():
        _, cache = feed(model, random_ids(2, 7))
        with torch.inference_mode():
            cache.reorder_cache(torch.tensor([1, 0]))
        feed(model, random_ids(2, 3), cache, cuts=(1,))
    assert cache.get_seq_length() == 10


def test_rows_of_a_cache_made_in_inference_mode_go_on_outside():
    model, ids = tiny_model(), random_ids(2, 10)
    expected, _ = feed(model, ids)
    with torch.inference_mode():
        _, cache = feed(model, ids[:, :7])
    cache.batch_select_indices(torch.tensor([1, 0]))
    found, _ = feed(model, ids.flip(0)[:, 7:], cache, cuts=(1,))
    found.sum().backward()
    torch.testing.assert_close(found.flip(0), expected[:, 7:], atol=1e-4, rtol=1e-4)


def test_a_checkpointed_call_is_recorded_once():
    model, ids = tiny_model(torch.float64, local_attention="sliding", segment_length=8), random_ids(1, 12)
    expected, cache = model(ids).logits[:, 8:], InfiniCache(model.config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cache.activate_past_recording()
    model.train()(ids[:, :5], past_key_values=cache).logits.sum().backward()
    with torch.no_grad():
        model(ids[:, 5:], past_key_values=cache)
        cache.crop(-4)
        assert relative_error(model(ids[:, 8:], past_key_values=cache).logits, expected) < 1e-5


def test_a_reset_cache_is_as_new():
    model = tiny_model(local_attention="sliding", num_sink_tokens=2)
    with torch.no_grad():
        expected, _ = feed(model, random_ids(2, 13))
        _, cache = feed(model, random_ids(2, 17, seed=1))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(feed(model, random_ids(2, 13), cache)[0], expected)


def test_a_cache_made_in_inference_mode_goes_on_outside():
    model, ids = tiny_model(), random_ids(1, 20)
    expected, _ = feed(model, ids)
    with torch.inference_mode():
        _, cache = feed(model, ids[:, :8])
    with torch.no_grad():
        middle, _ = feed(model, ids[:, 8:12], cache, cuts=(1, 2, 3))
    last, _ = feed(model, ids[:, 12:], cache, cuts=(1,))
    last.sum().backward()
    torch.testing.assert_close(torch.cat([middle, last], 1), expected[:, 8:], atol=1e-4, rtol=1e-4)


def test_reading_on_without_grad_leaves_a_graph_intact():
    model, ids = tiny_model(torch.float64), random_ids(1, 9)
    logits, cache = feed(model, ids, cuts=(7,))
    expected = torch.autograd.grad(logits.sum(), list(model.parameters()), retain_graph=True)
    with torch.no_grad():
        feed(model, random_ids(1, 12), cache, cuts=range(1, 12))
    found = torch.autograd.grad(logits.sum(), list(model.parameters()))
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected))


def test_caches_that_do_not_fit_are_refused():
    model = tiny_model()
    with pytest.raises(TypeError, match="must be an InfiniCache, got DynamicCache"):
        model(random_ids(1, 3), past_key_values=DynamicCache())
    _, cache = feed(model, random_ids(1, 3))
    with pytest.raises(ValueError, match=r"holds 1 rows, but the inputs have 2.*batch_repeat_interleave"):
        model(random_ids(2, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="made with num_hidden_layers=2, and this model has num_hidden_layers=3"):
        tiny_model(num_hidden_layers=3)(random_ids(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="made with use_mem_delta_rule=False, and this model"):
        tiny_model(use_mem_delta_rule=True)(random_ids(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match=r"torch.float32 keys, but the model computes in torch.float64"):
        tiny_model(torch.float64)(random_ids(1, 3), past_key_values=cache)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing loses the gradient"):
        model(random_ids(1, 3), past_key_values=cache)
