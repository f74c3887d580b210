"""Tensor parallelism, which splits heads over processes: what transformers' styles lack, and what cannot be split."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .configuration_infini import SHARED_BY_HEADS, InfiniConfig


class SharedByHeads(TensorParallelLayer):
    """
    Parameters that all heads share: whole in each process, which sums the gradients of its own heads with the others'.

    Each backward pass adds the sum to `.grad`. "replicated_with_grad_allreduce" of transformers sums `.grad` itself
    after each backward pass, so that what was accumulated before counts once more.
    """

    @contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        parameters = dict(module._parameters)
        for name, parameter in parameters.items():
            whole = DTensor.from_local(parameter, mesh, [Replicate()], run_check=False)
            module._parameters[name] = whole.to_local(grad_placements=[Partial()])  # type: ignore[assignment]
        try:
            yield
        finally:
            module._parameters.update(parameters)


def check_heads(config: InfiniConfig, tp_size: int) -> None:
    """
    Raises:
        ValueError: if the KV heads, with the query heads and the memory of each, cannot be split evenly.
    """
    if config.num_key_value_heads % tp_size:
        raise ValueError(
            f"tp_size={tp_size} does not divide num_key_value_heads={config.num_key_value_heads}: tensor parallelism "
            "gives whole KV heads to each process, as many to one as to another, with their query heads and their "
            "memory. Choose a tp_size that divides them; fsdp_size may be any number."
        )


ALL_PARALLEL_STYLES.register(SHARED_BY_HEADS, SharedByHeads())  # type: ignore[arg-type]
