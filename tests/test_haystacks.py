"""Filler and what is hidden in it: nothing is torn, lost or elsewhere than asked for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infini_transformers.evaluation.haystacks import (
    REPEATED_SENTENCE,
    Filler,
    encode,
    hide,
    repeated_sentence,
    text_filler,
)


# Tokens from here on are of pieces, those below of filler.
FIRST_OF_PIECES = 1000
# Often equal, and often at the ends.
DEPTHS = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def counting_filler(length):
    return Filler("counting", torch.arange(length))


@st.composite
def pieces_to_hide(draw):
    """Depth and ids of each piece; no token stands in two of them."""
    pieces, start = [], FIRST_OF_PIECES
    for depth, length in draw(st.lists(st.tuples(DEPTHS, st.integers(1, 4)), max_size=6)):
        pieces.append((depth, torch.arange(start, start + length)))
        start += length
    return pieces


def tokens_in(pieces):
    return sum(len(ids) for _, ids in pieces)


class TestFiller:
    @given(period=st.integers(1, 9), start=st.integers(-20, 40), length=st.integers(0, 40))
    def test_passage_wraps(self, period, start, length):
        ids = torch.arange(100, 100 + period)
        found = Filler("", ids).passage(start, length)
        assert found.tolist() == [ids[(start + index) % period].item() for index in range(length)]

    def test_sentence_is_repeated_with_spaces_between(self, tokenizer):
        filler = repeated_sentence(tokenizer)
        text = tokenizer.decode(filler.passage(0, 3 * len(filler.ids)))
        assert text == f" {REPEATED_SENTENCE} {REPEATED_SENTENCE} {REPEATED_SENTENCE}"

    def test_text_has_single_spaces(self, tokenizer):
        filler = text_filler(tokenizer, "book", "\n One\t two,\r\n\n  three. \n")
        assert filler.name == "book"
        assert tokenizer.decode(filler.ids) == " One two, three."

    @pytest.mark.parametrize("text", ["", " ", "\n\t \r\n"])
    def test_refuses_empty_text(self, tokenizer, text):
        with pytest.raises(ValueError, match=r"^book holds no text"):
            text_filler(tokenizer, "book", text)

    def test_encoding_nothing_gives_no_ids(self, tokenizer):
        assert encode(tokenizer, "").shape == (0,)
        assert encode(tokenizer, "").dtype == torch.long


class TestHide:
    @given(period=st.integers(1, 9), room=st.integers(0, 40), pieces=pieces_to_hide(), seed=SEEDS)
    def test_every_piece_is_whole_and_at_its_depth(self, period, room, pieces, seed):
        length = tokens_in(pieces) + room
        found = hide(counting_filler(period), length, pieces, np.random.default_rng(seed))
        assert found.shape == (length,)
        assert found.dtype == torch.long

        of_filler = found < FIRST_OF_PIECES
        assert of_filler.sum() == room
        for depth, ids in pieces:
            (start,) = (found == ids[0]).nonzero().flatten().tolist()
            assert torch.equal(found[start : start + len(ids)], ids)
            # As near as whole tokens come.
            assert abs(of_filler[:start].sum().item() - depth * room) <= 0.5

    @given(period=st.integers(1, 9), room=st.integers(0, 40), pieces=pieces_to_hide(), seed=SEEDS)
    def test_filler_around_the_pieces_is_one_cyclic_passage(self, period, room, pieces, seed):
        found = hide(counting_filler(period), tokens_in(pieces) + room, pieces, np.random.default_rng(seed))
        passage = found[found < FIRST_OF_PIECES].tolist()
        assert passage == [(passage[0] + index) % period for index in range(room)]

    @given(room=st.integers(0, 40), pieces=pieces_to_hide(), seed=SEEDS)
    def test_order_is_that_of_depths_and_then_as_given(self, room, pieces, seed):
        found = hide(counting_filler(7), tokens_in(pieces) + room, pieces, np.random.default_rng(seed))
        # Tokens of pieces count up as given.
        expected = sorted((depth, token) for depth, ids in pieces for token in ids.tolist())
        assert found[found >= FIRST_OF_PIECES].tolist() == [token for _, token in expected]

    def test_by_hand(self):
        def piece(depth, *ids):
            return depth, torch.tensor(ids)

        pieces = [piece(1, 50), piece(0, 60, 61), piece(0.5, 70), piece(0, 80), piece(0.5, 90, 91), piece(1, 10, 11)]
        found = hide(Filler("", torch.tensor([3])), 13, pieces, np.random.default_rng(0))
        assert found.tolist() == [60, 61, 80, 3, 3, 70, 90, 91, 3, 3, 50, 10, 11]

    def test_pieces_may_be_empty_or_none(self):
        filler, nothing = counting_filler(5), torch.tensor([], dtype=torch.long)
        alone = hide(filler, 12, [], np.random.default_rng(1))
        assert torch.equal(alone, filler.passage(alone[0].item(), 12))
        assert torch.equal(hide(filler, 12, [(0.0, nothing), (0.4, nothing)], np.random.default_rng(1)), alone)

    def test_filler_starts_anywhere_as_the_generator_has_it(self):
        filler, pieces = counting_filler(5), [(0.5, torch.tensor([FIRST_OF_PIECES]))]
        found = [hide(filler, 12, pieces, np.random.default_rng(seed)) for seed in range(60)]
        assert {ids[0].item() for ids in found} == {0, 1, 2, 3, 4}
        for seed, ids in enumerate(found):
            assert torch.equal(hide(filler, 12, pieces, np.random.default_rng(seed)), ids)

    @given(pieces=pieces_to_hide(), missing=st.integers(1, 30), seed=SEEDS)
    def test_refuses_pieces_that_alone_are_longer(self, pieces, missing, seed):
        needed = tokens_in(pieces)
        length = max(0, needed - missing)
        if length == needed:
            assert hide(counting_filler(5), length, pieces, np.random.default_rng(seed)).shape == (0,)
            return
        with pytest.raises(ValueError, match=rf"takes {needed} tokens: {length} are too few"):
            hide(counting_filler(5), length, pieces, np.random.default_rng(seed))

    def test_changes_neither_filler_nor_pieces(self):
        filler, pieces = counting_filler(5), [(1.0, torch.tensor([2000])), (0.0, torch.tensor([1000, 1001]))]
        hide(filler, 20, pieces, np.random.default_rng(0)).zero_()
        hide(filler, 4, pieces[:1], np.random.default_rng(0)).zero_()
        assert filler.ids.tolist() == [0, 1, 2, 3, 4]
        assert [(depth, ids.tolist()) for depth, ids in pieces] == [(1.0, [2000]), (0.0, [1000, 1001])]


@pytest.mark.parametrize("depth", [-0.5, 1.5])
def test_depths_outside_the_filler_are_refused(depth):
    filler = Filler("numbers", torch.arange(10))
    with pytest.raises(ValueError, match="between 0 and 1"):
        hide(filler, 100, [(depth, torch.tensor([1]))], np.random.default_rng(0))
