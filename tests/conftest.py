import pytest
import torch
from hypothesis import HealthCheck, settings
from tiny import compute_norm_and_rope_in_float64

from modeling_infini import memory_slots


torch.set_num_threads(1)
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# For `--hypothesis-profile core`.
settings.register_profile("core", settings.get_profile("tests"), max_examples=10)
settings.load_profile("tests")


@pytest.fixture
def small_passages(monkeypatch):
    """For segments of a few tokens, all of them neighbours. Other processes and remote code do not see it."""
    monkeypatch.setattr(memory_slots, "RADIUS", 1)


@pytest.fixture
def float64_norm_and_rope(monkeypatch):
    compute_norm_and_rope_in_float64(monkeypatch)
