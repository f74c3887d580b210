"""
Sharded models have the fingerprint of the whole one, and refuse memories as it does: `fingerprints.py FOLDER`, a saved
model. Writes what each process found beside it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny import random_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_infini import InfiniForCausalLM


def sharded_by_fsdp(folder: str) -> InfiniForCausalLM:
    model = InfiniForCausalLM.from_pretrained(folder)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def by_tensor_parallelism(folder: str, dtype: torch.dtype) -> InfiniForCausalLM:
    plan = DistributedConfig(tp_size=torch.distributed.get_world_size())
    return InfiniForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=plan)


@torch.no_grad()
def fingerprints(model: InfiniForCausalLM) -> list[str | None]:
    """Asked of the model, and by memories as they grow."""
    found = [model.weights_fingerprint()]
    cache = model.new_cache()
    for length in (7, 1, 1, 9):
        model(random_ids(1, length), past_key_values=cache)
        found.append(cache.weights.fingerprint)
    return found


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        models = [by_tensor_parallelism(folder, dtype)]
        # FSDP2 takes no model whose gates are in another dtype.
        models += [sharded_by_fsdp(folder)] if dtype == torch.float32 else []
        found[str(dtype)] = [fingerprint for model in models for fingerprint in fingerprints(model)]
        for model in models:
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight.mul_(2)
        found[f"{dtype} changed"] = [model.weights_fingerprint() for model in models]
    (Path(folder) / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
