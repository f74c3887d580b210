"""A tiny model beside the engine of vLLM that serves it."""

import gc

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from modeling_infini import InfiniForCausalLM


# Settings of all engines, unless a test says otherwise.
SETTINGS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 120,
    "max_num_seqs": 5,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**26,
}


class Served:
    """
    Attributes:
        model: of transformers, which says what is right; its weights stand in `folder`.
        llm: vLLM's, while the engine runs.
    """

    def __init__(self, model: InfiniForCausalLM, folder: str, settings: dict):
        self.model, self.folder = model, folder
        self.llm = LLM(folder, **{**SETTINGS, **settings})

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error) -> None:
        del self.llm
        gc.collect()

    def answers(self, prompts: list[list[int]], adapter: LoRARequest | list | None = None, **sampling) -> list:
        """vLLM's outputs for prompts that are there at once, with one adapter for all, or one for each."""
        prompts = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(prompts, greedy(**sampling), lora_request=adapter, use_tqdm=False)

    def generated(self, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
        """The greedy tokens of `generate()` and their log-probabilities `(count, vocabulary)`."""
        found = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(found.logits, 1)[0]
        return found.sequences[0, len(prompt) :].tolist(), logits.log_softmax(-1)

    def check(self, output, count: int) -> None:
        """An output has the tokens of `generate()`, and log-probabilities as close as float32 lets them be."""
        tokens, expected = self.generated(output.prompt_token_ids, count)
        (answer,) = output.outputs
        assert list(answer.token_ids) == tokens
        for position, found in enumerate(answer.logprobs):
            for token, logprob in found.items():
                assert abs(logprob.logprob - expected[position, token].item()) < 1e-4


def greedy(**sampling) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 8, "logprobs": 3, "detokenize": False, **sampling})
