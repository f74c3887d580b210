"""
What tensor-parallel processes compute from models that are saved in `FOLDER / NAME`: `tensor_parallel.py FOLDER`.
Writes logits, generated tokens, gates and gradients beside each model; `compute(model)` is the same for one process.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import random_ids
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_infini import InfiniForCausalLM


def compute(model: InfiniForCausalLM) -> dict[str, torch.Tensor]:
    """Over several segments: logits at once and in calls, tokens generated, and the gradients of a training step."""
    ids, mask = random_ids(2, 23), torch.ones(2, 23, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        results = {"logits": model(ids, attention_mask=mask).logits}
        cache = model.new_cache()
        calls = [model(part, past_key_values=cache).logits for part in ids.split([8, 1, 6, 8], 1)]
        results["logits in calls"] = torch.cat(calls, 1)
        results["generated"] = model.generate(ids, max_new_tokens=12, do_sample=False)
        results["local shares"] = model.local_shares()
    model.train()
    model(ids, attention_mask=mask, labels=ids.where(mask > 0, -100), use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        results[f"gradient of {name}"] = whole(parameter.grad)
    return {name: tensor.detach().contiguous() for name, tensor in results.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for model_folder in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        model = InfiniForCausalLM.from_pretrained(
            model_folder, distributed_config=DistributedConfig(tp_size=torch.distributed.get_world_size())
        )
        results = compute(model)
        gates = model.model.layers[0].self_attn.head_gates.weight
        results["gates here"] = gates.to_local().detach().clone()
        save_file(results, model_folder / f"results-{os.environ['RANK']}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
