"""The base of a model that runs, without a second copy of its weights."""

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_infini import InfiniForCausalLM

from .architectures import base_config


def base_of(model: InfiniForCausalLM) -> PreTrainedModel:
    """
    The base of a model: full attention, no memory. Its parameters are the same tensors as those of `model`, frozen, so
    that it takes no memory of its own. Make it when `model` is where it is to run, and before PEFT wraps it: to
    another device or dtype, one goes without the other.

    Raises:
        ValueError: if no base architecture has the model's parameters.
    """
    # Of its own parameters, only the shapes; what is computed from the configuration, such as angles, is its own.
    with init_empty_weights():
        base = AutoModelForCausalLM.from_config(base_config(model.config), dtype=model.dtype)
    names = set(base.state_dict())
    base.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in names}, assign=True)
    base.tie_weights()
    return base.requires_grad_(False).to(model.device).eval()


__all__ = ["base_of"]
