"""Losses with another text's memory in place of one's own."""

import copy

import torch
from tiny import random_ids, relative_error, tiny_model
from torch.nn.functional import cross_entropy

from evaluation.foreign_memory import losses_after, read


def test_ones_own_memory_changes_nothing_and_anothers_does():
    model = tiny_model(torch.float64)
    text, other = random_ids(1, 40), random_ids(1, 20, seed=1)
    own, foreign = read(model, text[:, :20]), read(model, other)
    with torch.no_grad():
        logits = model(text[:, 20:39], past_key_values=copy.deepcopy(own)).logits[0]
    expected = cross_entropy(logits.float(), text[0, 21:], reduction="none")
    assert relative_error(losses_after(model, text[:, 20:39], text[:, 21:], own, own), expected) < 1e-6
    assert relative_error(losses_after(model, text[:, 20:39], text[:, 21:], own, foreign), expected) > 1e-3
    assert own.get_seq_length() == 20
