"""Other ways to run an engine. Each gives the tokens of `generate()`, for a model that has every option."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import vllm.v1.worker.mamba_utils
from serving import SETTINGS, greedy
from tiny import EVERY_OPTION, random_ids
from vllm import LLM
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler

from infini_transformers.evaluation.haystacks import find_filler
from infini_transformers.evaluation.passkey import passkey_example
from modeling_infini import InfiniForCausalLM


ROOT = Path(__file__).parent.parent
PROMPTS = [random_ids(length, seed=length).tolist() for length in (1, 2, 7, 12, 30)]
START = random_ids(43, seed=9).tolist()
CONTINUED = [START + random_ids(length, seed=length).tolist() for length in (1, 2, 7, 12, 30)]


def check(served, outputs) -> None:
    for output in outputs:
        served.check(output, 8)


@pytest.mark.parametrize("pages", [40, 5])
def test_starts_that_were_read_before(serve, monkeypatch, pages):
    """With few pages, running requests are preempted, and read what is left of their prompts."""
    preempted, preempt = [], Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler, "_preempt_request", lambda self, *args, **kwargs: preempted.append(preempt(self, *args, **kwargs))
    )
    settings = {"enable_prefix_caching": True, "block_size": 8, "max_num_batched_tokens": 16}
    with serve(EVERY_OPTION, num_gpu_blocks_override=pages, **settings) as served:
        for _ in range(2):
            outputs = served.answers(CONTINUED)
            check(served, outputs)
            assert sum(output.num_cached_tokens >= 40 for output in outputs) >= 2
        assert bool(preempted) == (pages == 5)
        # The control: without the states from the ends of blocks, answers are others.
        monkeypatch.setattr(vllm.v1.worker.mamba_utils, "do_mamba_copy_block", lambda buffers: None)
        for output in served.answers(CONTINUED):
            with pytest.raises(AssertionError):
                served.check(output, 8)


@pytest.mark.parametrize("interval", [0, 8])
def test_starts_whose_ends_differ(serve, interval):
    """By default, a start is found again if it was sent alone; else also where steps of reading have ended in it."""
    settings = {"enable_prefix_caching": True, "block_size": 8, "max_num_batched_tokens": 16}
    with serve(EVERY_OPTION, prefix_cache_retention_interval=interval, **settings) as served:
        ends = [START + random_ids(30, seed=seed).tolist() for seed in range(3)]
        outputs = [output for prompt in ends[:2] for output in served.answers([prompt])]
        check(served, outputs)
        assert [output.num_cached_tokens for output in outputs] == [0, 32 if interval else 0]
        served.answers([START], max_tokens=1)
        (output,) = served.answers(ends[2:])
        check(served, [output])
        assert output.num_cached_tokens == 40


def test_adapters(serve, tmp_path):
    """A LoRA of all projections, beside requests without it; what is of the memory is refused by name."""
    # vLLM's operator for CPUs gives requests without an adapter that of the last slot.
    settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_num_batched_tokens": 16}
    with serve(EVERY_OPTION, **settings) as served:
        check(served, served.answers(PROMPTS))
        projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=4, target_modules=projections, init_lora_weights=False)
        base = served.model
        served.model = peft.get_peft_model(base, lora).eval()
        served.model.save_pretrained(tmp_path / "projections")
        adapter = LoRARequest("projections", 1, str(tmp_path / "projections"))
        mixed = served.answers(2 * PROMPTS, [adapter] * len(PROMPTS) + [None] * len(PROMPTS))
        check(served, mixed[: len(PROMPTS)])
        with served.model.disable_adapter():
            check(served, mixed[len(PROMPTS) :])
            check(served, served.answers(PROMPTS))

        served.model.unload()
        lora = peft.LoraConfig(r=4, target_modules=["write_gate"])
        peft.get_peft_model(base, lora).save_pretrained(tmp_path / "memory")
        with pytest.raises(ValueError, match="write_gate"):
            served.answers(PROMPTS, LoRARequest("memory", 2, str(tmp_path / "memory")))


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel_size": 2},
        # On a CPU, vLLM makes what it passes from layers to layers when it compiles.
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["heads", "layers"],
)
def test_two_processes(serve, monkeypatch, tmp_path, settings):
    """They share the heads or the layers; the engine is in a process of its own."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with serve(EVERY_OPTION, max_num_batched_tokens=16, **settings) as served:
        check(served, served.answers(PROMPTS))


def test_inductor(serve, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with serve(EVERY_OPTION, enforce_eager=False, max_num_batched_tokens=16) as served:
        check(served, served.answers(PROMPTS))


def test_bfloat16(serve):
    """M and z are float32. Log-probabilities are as far from those of float32 as those of the model in bfloat16."""
    with serve(EVERY_OPTION, dtype="bfloat16", max_num_batched_tokens=16) as served:
        worker = served.llm.llm_engine.model_executor.driver_worker.worker
        for layer in worker.get_model().model.layers:
            states = dict(zip(layer.self_attn.page, layer.self_attn.kv_cache))
            assert {states[name].dtype for name in ("memory", "normaliser")} == {torch.float32}
            assert states["keys"].dtype == torch.bfloat16
        rounded = InfiniForCausalLM.from_pretrained(served.folder, dtype=torch.bfloat16)
        errors, errors_of_model = [], []
        for output in served.answers(PROMPTS):
            ids = torch.tensor([output.prompt_token_ids + list(output.outputs[0].token_ids)])
            with torch.no_grad():
                right, of_model = (model(ids).logits[0].float().log_softmax(-1) for model in (served.model, rounded))
            for position, found in enumerate(output.outputs[0].logprobs, len(output.prompt_token_ids) - 1):
                for token, logprob in found.items():
                    errors.append(abs(logprob.logprob - right[position, token].item()))
                    errors_of_model.append(abs(of_model[position, token] - right[position, token]).item())
        assert sum(errors) < 1.5 * sum(errors_of_model)


@pytest.mark.parametrize(("length", "depths"), [(131_072, (0.1, 0.4, 0.6, 0.9)), (1_048_576, (0.3,))])
def test_long_texts(length, depths):
    """The published checkpoint finds its number in each of several texts at once, or in one of a million tokens."""
    checkpoint = ROOT / "checkpoints" / "passkey"
    settings = {"trust_remote_code": True, "skip_tokenizer_init": False, "max_model_len": length, "max_num_seqs": 4}
    llm = LLM(str(checkpoint), **{**SETTINGS, **settings}, max_num_batched_tokens=8192)
    tokenizer, generator = llm.get_tokenizer(), np.random.default_rng(0)
    filler = find_filler(tokenizer, "sentence")
    examples = [passkey_example(tokenizer, filler, length, depth, generator) for depth in depths]
    starts = [int(example.answer_positions[0]) for example in examples]
    prompts = [{"prompt_token_ids": example.input_ids[:start].tolist()} for example, start in zip(examples, starts)]
    outputs = llm.generate(prompts, greedy(max_tokens=length - starts[0], detokenize=True), use_tqdm=False)
    answers = [output.outputs[0].text.strip() for output in outputs]
    assert answers == [example.facts["answer"] for example in examples]
