import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import seeded

from modeling_infini.memory import MemoryState, delta_correction, feature_map, linear_write, read_memory, scan


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def test_feature_map_is_elu_plus_one_with_its_gradient():
    x = torch.cat([random(100), torch.zeros(1, dtype=torch.float64)]).requires_grad_()
    expected = torch.nn.functional.elu(x) + 1
    torch.testing.assert_close(feature_map(x), expected)
    found, wanted = (torch.autograd.grad(y.sum(), x)[0] for y in (feature_map(x), expected))
    torch.testing.assert_close(found, wanted)


def test_feature_map_keeps_the_digits_of_small_features():
    x = torch.tensor([-18.0, -30.0, 100.0])
    torch.testing.assert_close(feature_map(x), torch.tensor([1.5229979744712628e-08, 9.357622968840175e-14, 101.0]))


def test_an_empty_memory_reads_as_zero():
    features = feature_map(random(3, 4))
    read = read_memory(features, MemoryState(torch.zeros(4, 4).double(), torch.zeros(4).double()), 1e-10)
    assert torch.equal(read, torch.zeros(3, 4).double())


def test_reading_one_written_token_gives_its_value():
    features, value = feature_map(random(1, 4)), random(1, 4, seed=1)
    memory = linear_write(features, value)
    torch.testing.assert_close(read_memory(feature_map(random(1, 4, seed=2)), memory, 1e-10), value)


@pytest.mark.core
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_the_scan_equals_the_delta_rule_segment_by_segment(segments, length, seed):
    features = feature_map(random(2, segments, length, 3, seed=seed))
    values = random(2, segments, length, 3, seed=seed + 1)
    writes, normaliser_writes = linear_write(features, values)
    empty, empty_normaliser = torch.zeros(2, 3, 3).double(), torch.zeros(2, 3).double()
    normalisers = scan(empty_normaliser, normaliser_writes)
    scanned = scan(empty, writes, delta_correction(features, normalisers[:, :-1], 1e-10))

    memory, normaliser = empty, empty_normaliser
    for s in range(segments):
        torch.testing.assert_close(scanned[:, s], memory)
        torch.testing.assert_close(normalisers[:, s], normaliser)
        target = values[:, s]
        if s > 0:
            target = target - read_memory(features[:, s], MemoryState(memory, normaliser), 1e-10)
        memory = memory + features[:, s].transpose(1, 2) @ target
        normaliser = normaliser + features[:, s].sum(1)
    torch.testing.assert_close(scanned[:, segments], memory)


def test_delta_correction_of_an_empty_memory_is_zero_with_finite_gradient():
    keys = random(2, 3, 4).requires_grad_()
    correction = delta_correction(feature_map(keys), torch.zeros(2, 4).double(), 1e-10)
    assert torch.equal(correction, torch.zeros_like(correction))
    assert torch.autograd.grad(correction.sum(), keys)[0].isfinite().all()
