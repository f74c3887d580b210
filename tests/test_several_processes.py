"""Two processes, on CPUs with gloo, do what one does: DDP, FSDP2 and tensor parallelism by the stock launchers."""

import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from several_processes.compute import conversation, of_batch, of_rows
from several_processes.train import CASES, EVEN_VOCABULARY, RESUMED_AT, case_model, run
from tiny import EVERY_OPTION, VOCABULARY, relative_error, tiny_model
from transformers import LlamaConfig
from transformers.distributed.configuration_utils import DistributedConfig
from versions import (
    NEEDS_RESUMING_ON_CPUS,
    NEEDS_TRAINING_BY_TENSOR_PARALLELISM,
    RESUMES_ON_CPUS,
    SHARES_OUT_UNEVENLY,
    TRAINS_BY_TENSOR_PARALLELISM,
)

from modeling_infini import InfiniConfig, InfiniForCausalLM
from modeling_infini.training import DocumentStreams, InfiniTrainer, InfiniTrainingArguments


ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "several_processes"
CONFIGS = ROOT / "examples" / "launch"
FSDP_CASES = ("whole", "stock", "chunks", "truncated", "streams", "resumed")
DDP_CASES = [name for name in CASES if name != "resumed" and (RESUMES_ON_CPUS or not CASES[name].resumes)]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "TQDM_DISABLE": "1",
}


def launch(*command: str | Path) -> None:
    """Runs a launcher of several processes, and fails with what they wrote."""
    code, output = launched(*command)
    if code != 0 and "SIGSEGV" in output:
        # All of this is Python: PyTorch itself has crashed. It did so once in some hundred launches, in FSDP2 on CPUs.
        warnings.warn(f"PyTorch has crashed, and is run once more:\n{output[-20_000:]}", stacklevel=2)
        code, output = launched(*command)
    assert code == 0, output[-20_000:]


def launched(*command: str | Path, seconds: float = 900) -> tuple[int, str]:
    """What a launcher returns, and what its processes wrote."""
    launcher = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        output, _ = launcher.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(launcher.pid, signal.SIGKILL)
        output, _ = launcher.communicate()
        pytest.fail(f"still running after {seconds} s:\n{output[-8000:]}")
    return launcher.returncode, output


def torchrun(*command: str | Path) -> None:
    launch("torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command)


def accelerate(config: str, *command: str | Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--config_file", CONFIGS / config, "--main_process_port", str(port))
    launch("accelerate.commands.accelerate_cli", "launch", *options, *command)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The folder of each case, as this process alone trains it."""
    folder, results = tmp_path_factory.mktemp("one"), {}

    def train(name: str) -> tuple[dict, Path]:
        if name not in results:
            results[name] = run(CASES[name], folder / name)
        return results[name], folder / name

    return train


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    torchrun(SCRIPTS / "train.py", folder, *DDP_CASES)
    return folder


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    accelerate("fsdp2.yaml", SCRIPTS / "train.py", folder, *FSDP_CASES)
    return folder


def assert_same_training(found: Path, expected: tuple[dict, Path], results: str = "results.json") -> None:
    logs, folder = expected
    found_logs = json.loads((found / results).read_text())
    assert found_logs.keys() == logs.keys()
    for name, values in logs.items():
        assert found_logs[name] == pytest.approx(values, rel=2e-6), name
    models = [InfiniForCausalLM.from_pretrained(path / "model").state_dict() for path in (found, folder)]
    for name, weight in models[1].items():
        assert relative_error(models[0][name], weight) < 1e-6, name


def assert_resumed(folder: Path) -> None:
    logs = json.loads((folder / "results.json").read_text())
    assert len(logs["loss"]) > RESUMED_AT
    for name in [name for name in logs if not name.endswith(" resumed")]:
        assert logs[f"{name} resumed"] == pytest.approx(logs[name], rel=1e-9), name


class TestDDP:
    @pytest.mark.parametrize("name", DDP_CASES)
    def test_trains_as_one_process(self, ddp, one_process, name):
        assert_same_training(ddp / name, one_process(name))

    @NEEDS_RESUMING_ON_CPUS
    def test_streams_go_on_from_a_checkpoint(self, ddp):
        assert_resumed(ddp / "streams")
        memories = (ddp / "streams" / f"checkpoint-{RESUMED_AT}").glob("memory-of-streams-*")
        assert sorted(path.name for path in memories) == ["memory-of-streams-0", "memory-of-streams-1"]

    @NEEDS_RESUMING_ON_CPUS
    def test_evaluation_leaves_the_memory_of_training(self, ddp, one_process, tmp_path):
        case = CASES["streams"]
        never = {name: value for name, value in case.arguments.items() if name != "eval_steps"}
        logs = run(type(case)(arguments=never, streams=True), tmp_path)
        assert json.loads((ddp / "streams" / "results.json").read_text())["loss"] == pytest.approx(logs["loss"])


class TestFSDP2:
    @pytest.mark.parametrize("name", FSDP_CASES)
    def test_trains_as_one_process(self, fsdp2, one_process, name):
        assert_same_training(fsdp2 / name, one_process(name))

    @pytest.mark.parametrize("name", [name for name in FSDP_CASES if CASES[name].resumes])
    def test_goes_on_from_a_sharded_checkpoint(self, fsdp2, name):
        checkpoint = fsdp2 / name / f"checkpoint-{RESUMED_AT}"
        for part in ("pytorch_model_fsdp_0", "optimizer_0"):
            assert len(list((checkpoint / part).glob("*.distcp"))) == 2
        assert_resumed(fsdp2 / name)


HEADS = {
    "segment": {},
    "sliding": {"local_attention": "sliding", "num_sink_tokens": 2, "use_mem_delta_rule": True},
    "write gate": {"memory_write_gate": True},
    "every option": EVERY_OPTION,
    "every option, tied": {
        **EVERY_OPTION,
        "tie_word_embeddings": True,
        "pad_token_id": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 33 if SHARES_OUT_UNEVENLY else 34,
    },
}
ROWS = {"segment": {}, "every option, one KV head": {**EVERY_OPTION, "num_key_value_heads": 1}}
TENSOR_PARALLEL_CASES = ("chunks", "accumulated", "stock checkpointed")


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The folder in which two processes compute what one does: with all parallelisms, by one launch."""
    folder = tmp_path_factory.mktemp("computed")
    vocab_size = VOCABULARY if SHARES_OUT_UNEVENLY else EVEN_VOCABULARY
    for kind, models in (("heads", HEADS), ("rows", ROWS)):
        for name, fields in models.items():
            tiny_model(torch.float64, vocab_size=vocab_size, **fields).save_pretrained(folder / kind / name)
    (folder / "training").mkdir()
    for name in TENSOR_PARALLEL_CASES if TRAINS_BY_TENSOR_PARALLELISM else ():
        case_model(CASES[name]).save_pretrained(folder / "training" / name)
    torchrun(SCRIPTS / "compute.py", folder)
    return folder


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # A whole matrix is compared: what of it is 0 in one process may be a rounding error in the other.
        tolerance = 1e-6 * tensor.abs().max().item() + 1e-12 if tensor.is_floating_point() else 0
        assert (found[name] - tensor).abs().max() <= tolerance, name


def assert_same_weights(folder: Path) -> None:
    expected = InfiniForCausalLM.from_pretrained(folder).state_dict()
    found = InfiniForCausalLM.from_pretrained(folder / "saved").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


class TestTensorParallel:
    @pytest.mark.parametrize("name", HEADS)
    def test_gives_what_one_process_gives(self, computed, name):
        folder = computed / "heads" / name
        model = InfiniForCausalLM.from_pretrained(folder)
        expected = of_batch(model)
        gates = model.model.layers[1].self_attn.head_gates.weight.detach()
        for rank in range(2):
            # Of four heads, each process has its own two.
            here = {"gates here": gates[2 * rank : 2 * rank + 2]}
            assert_same(load_file(folder / f"results-{rank}.safetensors"), expected | here)
        assert_same_weights(folder)

    @NEEDS_TRAINING_BY_TENSOR_PARALLELISM
    @pytest.mark.parametrize("name", TENSOR_PARALLEL_CASES)
    def test_trains_as_one_process(self, computed, one_process, name):
        for rank in range(2):
            assert_same_training(computed / "training" / name, one_process(name), f"results-{rank}.json")

    def test_refuses_streams(self, monkeypatch, tmp_path):
        arguments = InfiniTrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True, report_to=[])
        trainer = InfiniTrainer(tiny_model(), arguments, train_dataset=DocumentStreams([[1, 2, 3]], 2, 2))
        monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
        with pytest.raises(ValueError, match="DocumentStreams do not go with tensor parallelism"):
            trainer.train()

    @pytest.mark.parametrize(("kv_heads", "tp_size"), [(1, 2), (2, 4), (3, 2), (6, 4)])
    def test_refuses_kv_heads_that_it_cannot_split(self, kv_heads, tp_size):
        model = tiny_model(num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads)
        with pytest.raises(ValueError, match=f"tp_size={tp_size} does not divide num_key_value_heads={kv_heads}"):
            InfiniForCausalLM.maybe_distribute_model(model, DistributedConfig(tp_size=tp_size), None)

    @pytest.mark.parametrize("fields", HEADS.values(), ids=list(HEADS))
    def test_plan_names_only_what_there_is(self, fields):
        model = tiny_model(**fields)
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        for rule in model.tp_plan:
            assert any(rule.replace("*", layer) in names for layer in "01")

    def test_plan_names_all_that_heads_have(self):
        model = tiny_model(**EVERY_OPTION)
        layer = model.model.layers[1].self_attn
        for name, _ in layer.named_parameters():
            rule = f"model.layers.*.self_attn.{name}"
            # The score of a token is one for all heads, whole in each process; nothing is differentiated through it.
            if "slot_score" not in name:
                assert rule in model.tp_plan or rule.rpartition(".")[0] in model.tp_plan, name


class TestRowsOfTheirOwn:
    """Parameters that only some of the processes use, since their texts end within a segment."""

    @pytest.mark.parametrize("how", ["fsdp2", "ddp"])
    @pytest.mark.parametrize("name", ROWS)
    def test_gradients_are_those_of_one_process(self, computed, name, how):
        folder = computed / "rows" / name
        expected = of_rows(InfiniForCausalLM.from_pretrained(folder))
        for rank in range(2):
            found = load_file(folder / f"{how}-{rank}.safetensors")
            assert_same({key: tensor for key, tensor in found.items() if key in expected}, expected)

    @pytest.mark.parametrize("name", ROWS)
    def test_fsdp2_generates_as_one_process(self, computed, name):
        folder = computed / "rows" / name
        model = InfiniForCausalLM.from_pretrained(folder)
        for rank in range(2):
            found = load_file(folder / f"fsdp2-{rank}.safetensors")
            for key, tensor in conversation(model, rank).items():
                assert torch.equal(found[key], tensor), key
        assert_same_weights(folder)


def test_every_option_is_on():
    of_llama, off, on = (vars(config) for config in (LlamaConfig(), InfiniConfig(), InfiniConfig(**EVERY_OPTION)))
    options = {name for name in off if off[name] is None or off[name] is False} - of_llama.keys() - {"converted_from"}
    assert all(on[name] for name in options)


class TestLaunchConfigurations:
    @pytest.mark.parametrize("config", sorted(path.name for path in CONFIGS.glob("*.yaml")))
    def test_is_understood_by_accelerate(self, config):
        assert load_config_from_file(str(CONFIGS / config)).num_processes == 2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("config", "runner"), [("ddp.yaml", ()), ("fsdp2.yaml", (SCRIPTS / "cpu_as_accelerator.py",))]
    )
    def test_runs_the_training_script(self, tmp_path, config, runner):
        corpus = tmp_path / "corpus"
        corpus.mkdir()
        for index in range(4):
            (corpus / f"{index}.txt").write_text("It was the best of times, it was the worst of times. " * (9 + index))
        arguments = {
            "train_files": corpus,
            "eval_files": corpus,
            "vocab_size": 300,
            "config_overrides": "hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4,"
            "num_key_value_heads=2,head_dim=8,segment_length=16,max_position_embeddings=64",
            "chunk_segments": 2,
            "max_steps": 2,
            "save_steps": 1,
            "per_device_train_batch_size": 1,
            "output_dir": tmp_path / "out",
        }
        options = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        accelerate(config, *runner, ROOT / "examples" / "train_clm.py", *options, "--use_cpu")
        model = InfiniForCausalLM.from_pretrained(tmp_path / "out")
        assert model.config.num_hidden_layers == 2
        assert (tmp_path / "out" / "checkpoint-1" / "tokenizer.json").is_file()
        assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] < 7
