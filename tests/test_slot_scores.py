"""Slots that keep what is stated: made-up facts, and the score that tells their tokens from those of texts."""

import re

import numpy as np
import pytest
import torch
from tokenizers_of_bases import BACKENDS
from transformers import PreTrainedTokenizerFast

from infini_transformers.conversion import slot_facts
from infini_transformers.conversion.slot_facts import TOKENS_PER_FACT, draw_fact, fact_windows
from infini_transformers.conversion.slot_scores import RIDGE, fit_slot_score
from modeling_infini.memory_slots import scores_of_passages


TEXTS = {
    "words": "It was a dark night. The rain fell in torrents, and 12 men stood at the corner of the street. " * 40,
    "short": "So it is.",
    "without spaces": "天地玄黄宇宙洪荒日月盈昃辰宿列张" * 30,
    "long tokens": "hi there, the  house" + " " * 3000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tokens_of_facts_are_known(monkeypatch, backend, text):
    fact = " The code of the hut is 90817."
    monkeypatch.setattr(slot_facts, "draw_fact", lambda generator: fact)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS[backend])
    length, count = 3 * TOKENS_PER_FACT, 6
    ids, is_fact = fact_windows(tokenizer, [text], length, count, 0)
    assert ids.shape == is_fact.shape == (count, length)
    assert is_fact.dtype == torch.bool
    found = 0
    for window, of_facts in zip(ids, is_fact):
        changes = (of_facts[1:] != of_facts[:-1]).nonzero()[:, 0] + 1
        runs = torch.tensor_split(window, changes)
        for run, kind in zip(runs, torch.tensor_split(of_facts, changes)):
            said = tokenizer.decode(run)
            if kind[0] and kind is not of_facts[-1]:
                found += said.count("90817")
            if not kind[0]:
                assert "9081" not in said
    assert found >= count


def test_neighbours_are_five_tokens_to_each_side_in_the_segment():
    found = scores_of_passages(torch.eye(40))
    for place, means in enumerate(found.T):
        near = range(max(0, place - 5), min(40, place + 6))
        torch.testing.assert_close(means, torch.tensor([(token in near) / len(near) for token in range(40)]))


def test_windows_follow_from_the_seed():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BACKENDS["byte_level"])
    first, again, other = (fact_windows(tokenizer, [TEXTS["words"]], 400, 4, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_facts_are_many_and_whole():
    generator = np.random.default_rng(0)
    facts = [draw_fact(generator) for _ in range(300)]
    assert len(set(facts)) > 290
    assert all(fact[0].isspace() and not re.search(r"[<>{}]", fact) for fact in facts)
    assert 100 < sum(any(character.isdigit() for character in fact) for fact in facts) < 250


def test_a_tokenizer_that_does_not_say_where_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="A Slow does not say where"):
        fact_windows(Slow(), ["text"], 10, 1, 0)


def test_the_score_is_that_of_a_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, 100, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 3
    is_fact = states @ torch.randn(12, generator=generator) + torch.randn(5, 100, generator=generator) > 4
    weight = fit_slot_score(list(states), is_fact)
    assert weight.shape == (1, 12)
    assert weight.dtype == torch.float32
    found, states = weight.double().requires_grad_(), states.double()
    centred = states - states.mean((0, 1))
    error = is_fact.double() - is_fact.double().mean() - centred @ found[0]
    penalty = RIDGE * centred.square().mean() * found.square().sum()
    (error.square().mean() + penalty).backward()
    assert found.grad.abs().max() < 1e-5
    # What all tokens have in common does not count.
    far_off = fit_slot_score(list((states + 500).float()), is_fact)
    torch.testing.assert_close(far_off, weight, rtol=1e-2, atol=1e-3)
    assert fit_slot_score(list(states.bfloat16()), is_fact).dtype == torch.float32


@pytest.mark.parametrize("value", [True, False])
def test_facts_alone_or_none_give_no_score(value):
    with pytest.raises(ValueError, match="tokens of both are needed"):
        fit_slot_score([torch.randn(9, 4)], torch.full((1, 9), value))
