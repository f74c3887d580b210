"""
Lets accelerate shard models on CPUs: it leaves FSDP out there, by the type of device alone; PyTorch has it with gloo.

As a script, runs another so: `accelerate launch --config_file fsdp2.yaml cpu_as_accelerator.py script.py ...`
"""

import runpy
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def use_cpu_as_accelerator() -> None:
    set_device = PartialState.set_device

    def set_device_and_type(state):
        if state.distributed_type != DistributedType.MULTI_CPU:
            return set_device(state)
        state.device = torch.device("cpu")
        state.distributed_type = DistributedType.MULTI_GPU

    PartialState.set_device = set_device_and_type  # type: ignore[method-assign]


if __name__ == "__main__":
    use_cpu_as_accelerator()
    torch.set_num_threads(1)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
