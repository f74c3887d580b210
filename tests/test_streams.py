"""
P2, P3, P5, P9: however a stream is cut into calls, padded, batched with others or packed behind others, each of its
tokens gets the logits that the reference gives for the stream alone.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import reference_stream
from tiny import MODES, config_fields, float64_weights, hurting_lengths, random_ids, relative_error, tiny_model

from modeling_infini import InfiniCache


PAD, TOKEN, NEW_DOCUMENT = 0, 1, 2


@st.composite
def calls(draw, segment_length: int, restarts: bool = True):
    """A list of calls; each is a grid of rows and columns of PAD, TOKEN and NEW_DOCUMENT."""
    rows = draw(st.integers(1, 3))
    cells = st.sampled_from([TOKEN] * 12 + [PAD] * 3 + [NEW_DOCUMENT] * restarts)
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(hurting_lengths(segment_length))
        if draw(st.booleans()):
            drawn.append([[TOKEN] * length for _ in range(rows)])
        else:
            drawn.append(
                draw(st.lists(st.lists(cells, min_size=length, max_size=length), min_size=rows, max_size=rows))
            )
    return drawn


def streams_of(drawn):
    """For each row a list of streams, each a list of (call, column)."""
    rows = [[[]] for _ in drawn[0]]
    for call, grid in enumerate(drawn):
        for row, cells in enumerate(grid):
            for column, cell in enumerate(cells):
                if cell == NEW_DOCUMENT and rows[row][-1]:
                    rows[row].append([])
                if cell != PAD:
                    rows[row][-1].append((call, column))
    return rows


def position_ids_of(drawn):
    """Position ids that restart at each new document; those of padding mislead on purpose."""
    ids = [torch.zeros(len(grid), len(grid[0]), dtype=torch.long) for grid in drawn]
    for row, streams in enumerate(streams_of(drawn)):
        for stream in streams:
            for position, (call, column) in enumerate(stream):
                ids[call][row, column] = position
    return ids


def check_against_reference(model, drawn, tolerance, use_mask, use_position_ids):
    inputs = [random_ids(len(grid), len(grid[0]), seed=call) for call, grid in enumerate(drawn)]
    masks = [torch.tensor(grid) != PAD for grid in drawn]
    position_ids = position_ids_of(drawn)
    cache = InfiniCache(model.config)
    logits = []
    with torch.no_grad():
        for ids, mask, positions in zip(inputs, masks, position_ids):
            extra = {"attention_mask": mask.long()} if use_mask else {}
            if use_position_ids:
                extra["position_ids"] = positions
            logits.append(model(ids, past_key_values=cache, **extra).logits)
    assert all(call.isfinite().all() for call in logits)

    weights = float64_weights(model)
    for row, streams in enumerate(streams_of(drawn)):
        for stream in filter(None, streams):
            expected, _ = reference_stream([inputs[c][row, t].item() for c, t in stream], weights, model.config)
            found = torch.stack([logits[c][row, t] for c, t in stream]).double()
            assert relative_error(found, expected) < tolerance
    read = [len(streams[-1]) for streams in streams_of(drawn)]
    assert cache.tokens_read.tolist() == read
    assert cache.get_seq_length() == sum(len(grid[0]) for grid in drawn)


@given(st.data())
def test_streams_equal_the_reference(float64_norm_and_rope, data):
    fields = data.draw(config_fields())
    drawn = data.draw(calls(fields["segment_length"]))
    model = tiny_model(torch.float64, **fields)
    check_against_reference(model, drawn, tolerance=1e-10, use_mask=True, use_position_ids=True)


@given(st.data())
def test_streams_without_position_ids_do_not_restart(float64_norm_and_rope, data):
    fields = data.draw(config_fields())
    drawn = data.draw(calls(fields["segment_length"], restarts=False))
    model = tiny_model(torch.float64, **fields)
    check_against_reference(model, drawn, tolerance=1e-10, use_mask=True, use_position_ids=False)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@given(data=st.data())
def test_streams_equal_the_reference_with_the_stock_norm_and_rope(data, dtype, tolerance):
    fields = data.draw(config_fields())
    drawn = data.draw(calls(fields["segment_length"]))
    check_against_reference(tiny_model(dtype, **fields), drawn, tolerance, use_mask=True, use_position_ids=True)


@pytest.mark.parametrize("fields", MODES)
@pytest.mark.parametrize("delta", [False, True])
def test_bfloat16_stays_near_float32(fields, delta):
    ids = random_ids(2, 33)
    # Few layers and small weights: what is compared is the memory's arithmetic, not chaos.
    model = tiny_model(use_mem_delta_rule=delta, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = model(ids).logits
        model = model.bfloat16()
        whole = model(ids, use_cache=False).logits
        cache = InfiniCache(model.config)
        stepped = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(33)], 1)
    assert cache.layers[0].memory.dtype == torch.float32
    assert relative_error(whole.float(), expected) < 0.1
    assert relative_error(stepped.float(), expected) < 0.1


@given(st.data())
def test_a_call_without_a_cache_equals_calls_with_one(data):
    fields = data.draw(config_fields())
    length = data.draw(hurting_lengths(fields["segment_length"]))
    model, ids = tiny_model(**fields), random_ids(2, length)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=True).logits)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        without = model(ids, attention_mask=mask, use_cache=False).logits
        with_cache = model(ids, attention_mask=mask, use_cache=True).logits
        assert torch.equal(without[mask.bool()], with_cache[mask.bool()])


def test_a_row_of_padding_alone_reads_nothing():
    model, cache = tiny_model(), None
    with torch.no_grad():
        for length in (7, 1):
            mask = torch.tensor([[1] * length, [0] * length])
            outputs = model(random_ids(2, length), attention_mask=mask, past_key_values=cache)
            cache = outputs.past_key_values
            assert outputs.logits.isfinite().all()
    assert cache.tokens_read.tolist() == [8, 0]
    with torch.no_grad():
        outputs = model(random_ids(1, 3), attention_mask=torch.zeros(1, 3))
    assert outputs.past_key_values.tokens_read.tolist() == [0]


def test_mask_of_the_whole_history_is_read_from_its_end():
    model, ids = tiny_model(), random_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[0, 12] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        cache = model(ids[:, :11], attention_mask=mask[:, :11]).past_key_values
        found = model(ids[:, 11:], attention_mask=mask, past_key_values=cache).logits
    assert relative_error(found[mask[:, 11:] == 1], expected[:, 11:][mask[:, 11:] == 1]) < 1e-5


def test_masks_that_do_not_fit_are_refused():
    model, ids = tiny_model(), random_ids(2, 6)
    with pytest.raises(ValueError, match="attention_mask must be of shape"):
        model(ids, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="attention_mask has 5 columns, but the inputs have 6"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="position_ids has 5 columns"):
        model(ids, position_ids=torch.arange(5).unsqueeze(0))
    with pytest.raises(ValueError, match="nothing to read"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="need position_ids that restart"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 6]))
