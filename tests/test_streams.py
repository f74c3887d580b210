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


pytestmark = pytest.mark.usefixtures("small_passages")


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
    """Position ids that are 0 at each new document and grow by 1 to 3 in it; those of padding mislead on purpose."""
    ids = [torch.zeros(len(grid), len(grid[0]), dtype=torch.long) for grid in drawn]
    for row, streams in enumerate(streams_of(drawn)):
        for stream in streams:
            for position, (call, column) in enumerate(stream):
                ids[call][row, column] = position + position // 2 * 2
    return ids


def document_numbers_of(drawn):
    """The number of each token's document in its row, 1, 2, ...; 0 for padding."""
    numbers = [torch.zeros(len(grid), len(grid[0]), dtype=torch.long) for grid in drawn]
    for row, streams in enumerate(streams_of(drawn)):
        for number, stream in enumerate(streams, 1):
            for call, column in stream:
                numbers[call][row, column] = number
    return numbers


def check_against_reference(model, drawn, tolerance, use_position_ids=False, numbers_documents=False):
    inputs = [random_ids(len(grid), len(grid[0]), seed=call) for call, grid in enumerate(drawn)]
    masks = [(torch.tensor(grid) != PAD).long() for grid in drawn]
    if numbers_documents:
        numbers = document_numbers_of(drawn)
        # With those of the whole history.
        masks = [torch.cat(numbers[: call + 1], 1) for call in range(len(drawn))]
    position_ids = position_ids_of(drawn)
    cache = InfiniCache(model.config)
    logits = []
    with torch.no_grad():
        for ids, mask, positions in zip(inputs, masks, position_ids):
            extra = {"position_ids": positions} if use_position_ids else {}
            logits.append(model(ids, attention_mask=mask, past_key_values=cache, **extra).logits)
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


@pytest.mark.core
@given(st.data())
def test_streams_equal_the_reference(float64_norm_and_rope, data):
    fields = data.draw(config_fields())
    drawn = data.draw(calls(fields["segment_length"]))
    model = tiny_model(torch.float64, **fields)
    check_against_reference(model, drawn, tolerance=1e-10, use_position_ids=True)


@pytest.mark.core
@given(st.data())
def test_documents_numbered_in_the_mask_equal_the_reference(float64_norm_and_rope, data):
    fields = data.draw(config_fields())
    drawn = data.draw(calls(fields["segment_length"]))
    use_position_ids = data.draw(st.booleans())
    model = tiny_model(torch.float64, **fields)
    check_against_reference(model, drawn, 1e-10, use_position_ids, numbers_documents=True)


@pytest.mark.core
@given(st.data())
def test_streams_without_position_ids_do_not_restart(float64_norm_and_rope, data):
    fields = data.draw(config_fields())
    drawn = data.draw(calls(fields["segment_length"], restarts=False))
    model = tiny_model(torch.float64, **fields)
    check_against_reference(model, drawn, tolerance=1e-10)


@pytest.mark.core
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@given(data=st.data())
def test_streams_equal_the_reference_with_the_stock_norm_and_rope(data, dtype, tolerance):
    fields = data.draw(config_fields())
    drawn = data.draw(calls(fields["segment_length"]))
    check_against_reference(tiny_model(dtype, **fields), drawn, tolerance, use_position_ids=True)


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


@pytest.mark.core
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
        outputs = model(random_ids(1, 3), attention_mask=torch.zeros(1, 3, dtype=torch.long))
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
    with pytest.raises(ValueError, match=r"position_ids must be whole numbers, got torch.float32"):
        model(ids, position_ids=torch.arange(6.0).unsqueeze(0))
    with pytest.raises(ValueError, match="nothing to read"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="attention_mask has 7 columns, but the inputs have 6, and nothing was read"):
        model(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="position_ids has 7 columns, but the inputs have 6, and nothing was read"):
        model(ids, position_ids=torch.arange(7).unsqueeze(0))


@pytest.mark.parametrize("length", [9, 3000])
def test_what_says_that_sequences_are_packed_is_held_to_the_position_ids(length):
    """Collators of packed sequences describe them for attention backends as well."""
    model, ids, half = tiny_model(segment_length=1024), random_ids(1, length), length // 2
    positions = torch.cat([torch.arange(half), torch.arange(length - half)]).unsqueeze(0)
    packing = {
        "cu_seq_lens_q": torch.tensor([0, half, length], dtype=torch.int32),
        "max_length_q": length,
        "seq_idx": (torch.arange(length) >= half).int().unsqueeze(0),
    }
    with torch.no_grad():
        found = model(ids, position_ids=positions, logits_to_keep=1, **packing).logits
        assert relative_error(found, model(ids[:, half:], logits_to_keep=1).logits) < 1e-5
        for name, argument in packing.items():
            with pytest.raises(ValueError, match=f"{name}: packed sequences need position_ids"):
                model(ids, logits_to_keep=1, **{name: argument})
        for name in ("cu_seq_lens_q", "seq_idx"):
            with pytest.raises(ValueError, match=f"{name} and position_ids disagree"):
                model(ids, position_ids=torch.arange(length)[None], logits_to_keep=1, **{name: packing[name]})
        # Starts in any order.
        positions = torch.arange(8).unsqueeze(0)
        with pytest.raises(ValueError, match="cu_seq_lens_q and position_ids disagree"):
            model(ids[:, :8], position_ids=positions, cu_seq_lens_q=torch.tensor([0, 8, 3]))


def test_a_long_call_numbers_its_documents_as_its_chunks_would():
    model = tiny_model(segment_length=1024)
    ids = random_ids(1, 5000)
    numbers = torch.ones_like(ids)
    numbers[:, 2500:], numbers[:, 3000:] = 2, 7
    with torch.no_grad():
        found = model(ids, attention_mask=numbers, logits_to_keep=1, use_cache=True)
        expected = model(ids[:, 3000:], logits_to_keep=1)
    assert relative_error(found.logits, expected.logits) < 1e-5
    assert found.past_key_values.tokens_read.tolist() == [2000]


@pytest.mark.core
@pytest.mark.parametrize(
    ("positions", "is_meant"),
    [
        ([0, 1, 2, 3, 4, 5], True),
        ([4, 5, 7, 9, 20, 21], True),  # starts in the middle, leaves some out
        ([0, 0, 0, 0, 1, 0], True),  # documents of one token
        ([0, 1, 2, 2, 2, 3], False),  # clamped
        ([0, 0, 1, 1, 2, 2], False),  # grouped
        ([5, 4, 3, 2, 1, 0], False),
        ([1, 2, 3, 1, 2, 3], False),  # counted from 1
        ([-1, 0, 1, 2, 3, 4], False),
    ],
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_ids_that_neither_grow_nor_start_at_0_are_refused(positions, is_meant, use_cache):
    model, ids, positions = tiny_model(), random_ids(1, 6), torch.tensor([positions])
    with torch.no_grad():
        if is_meant:
            model(ids, position_ids=positions, use_cache=use_cache)
            return
        cache = InfiniCache(model.config) if use_cache else None
        with pytest.raises(ValueError, match="position_ids must grow from each token to the next"):
            model(ids, position_ids=positions, past_key_values=cache, use_cache=use_cache)
        if use_cache:
            assert relative_error(model(ids, past_key_values=cache).logits, model(ids).logits) < 1e-6
        # The ids of padding say nothing.
        padded = torch.cat([positions, torch.tensor([[6, 7]])], 1)
        mask = torch.tensor([[0] * 6 + [1, 1]])
        model(random_ids(1, 8), position_ids=padded, attention_mask=mask)


def test_a_stream_goes_on_at_a_smaller_id_in_the_next_call():
    """generate() gives ids from 0 in each turn's mask; only 0 starts a stream."""
    model, ids = tiny_model(), random_ids(1, 12)
    with torch.no_grad():
        cache = model(ids[:, :8], position_ids=torch.arange(8).unsqueeze(0)).past_key_values
        found = model(ids[:, 8:], position_ids=torch.tensor([[3, 4, 5, 6]]), past_key_values=cache).logits
        assert relative_error(found, model(ids).logits[:, 8:]) < 1e-5


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0.0, 0.0, 0.0, -torch.inf], "additive mask"),
        ([0.0, 0.0, 0.0, 0.0], "additive mask"),
        ([1.0, 0.5, 1.0, 1.0], "other values"),
        ([1.0, torch.nan, 1.0, 1.0], "other values"),
        ([1.0, 1.0, 1.0, torch.inf], "other values"),
        ([-1, -1, 1, 1], "other values"),
        ([2, 2, 1, 1], "must grow along each row"),
        ([1, 2, 0, 1], "must grow along each row"),
    ],
)
def test_masks_that_mean_something_else_are_refused(mask, message):
    model, mask = tiny_model(), torch.tensor([mask])
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(random_ids(1, 4), attention_mask=mask)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(random_ids(1, 5), attention_mask=torch.cat([mask, mask[:, -1:]], 1), use_cache=False)


def test_numbers_of_documents_need_the_mask_of_what_was_read():
    model, ids = tiny_model(), random_ids(1, 12)
    numbers = torch.tensor([[1] * 4 + [2] * 6 + [3] * 2])
    with torch.no_grad():
        expected = model(ids, attention_mask=numbers).logits[:, 6:]
        cache = model(ids[:, :6], attention_mask=numbers[:, :6]).past_key_values
        with pytest.raises(ValueError, match="does not cover what the cache has read"):
            model(ids[:, 6:], attention_mask=numbers[:, 6:], past_key_values=cache)
        # A new batch, numbered from 1: its first document may be another than the last that was read.
        with pytest.raises(ValueError, match="does not cover what the cache has read"):
            model(ids[:, 6:], attention_mask=numbers[:, 6:] - 1, past_key_values=cache)
        positions = torch.tensor([[2, 3, 4, 5, 0, 1]])
        found = model(ids[:, 6:], attention_mask=numbers[:, 6:], position_ids=positions, past_key_values=cache)
    assert relative_error(found.logits, expected) < 1e-5
