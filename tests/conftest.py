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


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where tests that are marked core make their tensors, and tests/test_gpu.py its models",
    )


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("device")


@pytest.fixture(autouse=True)
def core_tests_on_device(request, device):
    if device == "cpu" or request.node.get_closest_marker("core") is None:
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def small_passages(monkeypatch):
    """For segments of a few tokens, all of them neighbours. Other processes and remote code do not see it."""
    monkeypatch.setattr(memory_slots, "RADIUS", 1)


@pytest.fixture
def float64_norm_and_rope(monkeypatch):
    compute_norm_and_rope_in_float64(monkeypatch)
