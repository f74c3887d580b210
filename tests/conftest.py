import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding


torch.set_num_threads(1)
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("tests")


@pytest.fixture
def float64_norm_and_rope(monkeypatch):
    """The stock norm and RoPE compute in float32; with this they compute in the dtype of their input."""

    def norm(self, states):
        return self.weight * states / (states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def rope(self, states, position_ids):
        dim, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
        inv_freq = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = position_ids[..., None].double() * inv_freq
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rope)
