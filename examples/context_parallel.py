"""
One training step on one sequence that several processes share, and what they send to each other for it.

    torchrun --nproc-per-node 2 examples/context_parallel.py

On CPU by gloo, with a small model of random weights. `docs/context_parallel.md` explains it.
"""

import argparse

import torch
from torch import distributed

from modeling_infini import InfiniConfig, InfiniForCausalLM
from modeling_infini.training import ContextParallel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096], help="tokens of the sequences")
    parser.add_argument("--segment_length", type=int, default=64)
    parser.add_argument("--linear_rule", action="store_true", help="instead of the delta rule")
    parser.add_argument("--local_attention", choices=["segment", "sliding"], default="sliding")
    arguments = parser.parse_args()

    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    is_sliding = arguments.local_attention == "sliding"
    config = InfiniConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        segment_length=arguments.segment_length,
        use_mem_delta_rule=not arguments.linear_rule,
        local_attention=arguments.local_attention,
        num_sink_tokens=4 if is_sliding else 0,
    )
    model = InfiniForCausalLM(config)

    for length in arguments.lengths:
        ids = torch.randint(0, config.vocab_size, (1, length))
        context_parallel = ContextParallel()
        inputs = context_parallel.shard(config, input_ids=ids, labels=ids)
        loss = model(**inputs, past_key_values=context_parallel).loss
        loss.backward()
        context_parallel.reduce_gradients(model)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}

        # One process alone, for comparison.
        model.zero_grad()
        expected = model(ids, labels=ids, use_cache=False).loss
        expected.backward()
        largest = max((p.grad - gradients[name]).abs().max().item() for name, p in model.named_parameters())
        model.zero_grad()
        loss = loss.detach()
        distributed.all_reduce(loss)
        print(
            f"rank {context_parallel.rank} of {context_parallel.size}: {inputs['input_ids'].shape[1]} of {length} "
            f"tokens, {context_parallel.bytes_sent} bytes sent, loss {loss:.4f} (one process: {expected:.4f}), "
            f"largest difference of a gradient {largest:.1e}"
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
