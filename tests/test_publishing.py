"""What others load: saved folders and repositories, by their own code files, without this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base_models import base_model
from hub_server import TOKEN, USER, local_hub
from huggingface_hub import ModelCard, ModelCardData
from tiny import MODES, random_ids, tiny_config, tiny_model
from transformers.pipelines import SUPPORTED_TASKS
from versions import FINDS_PINNED_FILES_ALONE

import modeling_infini
from infini_transformers.conversion.model_card import model_card
from modeling_infini import InfiniForCausalLM, InfiniForSequenceClassification, state_nbytes


ROOT = Path(__file__).parent.parent
CODE_FILES = {file.name for file in Path(modeling_infini.__file__).parent.glob("*.py")} - {"__init__.py"}
AUTO_CLASSES = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
}

MODEL_CLASSES = ("InfiniModel", *(name for name in modeling_infini.__all__ if name.startswith("InfiniFor")))

IDS = random_ids(2, 13)

LOAD = """
import json, sys, torch
import transformers
torch.set_num_threads(1)
auto_class, source, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ids, answers = torch.tensor(json.loads(sys.argv[4])), []
for each in options:
    model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True, **each)
    assert type(model).__module__.startswith("transformers_modules.")
    # On the Hub, each commit has its own code.
    assert len(each.get("revision", "")) < 40 or each["revision"] in type(model).__module__
    found = model.generate(ids, max_new_tokens=9) if model.can_generate() else model(ids)[0]
    answers.append(found.tolist())
assert "modeling_infini" not in sys.modules
print(json.dumps(answers))
if len(sys.argv) > 5:
    model.save_pretrained(sys.argv[5])
"""


def load_elsewhere(
    folder, source, auto_class="AutoModelForCausalLM", python=sys.executable, options=({},), save_to=()
):
    """
    What models loaded with trust_remote_code in one other process, one with each of the `options`, answer to `IDS`.
    """
    command = [python, "-c", LOAD, auto_class, str(source), json.dumps(list(options)), json.dumps(IDS.tolist())]
    command += [str(path) for path in save_to]
    return json.loads(run(folder, command))


def run(folder, command, **environment):
    folder.mkdir(exist_ok=True)
    caches = {"HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | caches | environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected_answer(model):
    with torch.no_grad():
        found = model.generate(IDS, max_new_tokens=9) if model.can_generate() else model(IDS)[0]
    return found.tolist()


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory):
    """A Python that has transformers, torch and einops, and nothing of ours."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch", "transformers", "einops"], check=True)
    yield str(folder / "bin" / "python")
    shutil.rmtree(folder)


@pytest.fixture(params=["ours", pytest.param("clean", marks=pytest.mark.slow)])
def python(request):
    return sys.executable if request.param == "ours" else request.getfixturevalue("clean_python")


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_every_class_saves_its_code(tmp_path, name):
    getattr(modeling_infini, name)(tiny_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == AUTO_CLASSES
    assert {f"{reference.split('.')[0]}.py" for reference in auto_map.values()} <= CODE_FILES
    assert {file.name for file in tmp_path.glob("*.py")} == CODE_FILES


def test_a_configuration_alone_saves_its_code(tmp_path):
    tiny_config().save_pretrained(tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").glob("*.py")} == CODE_FILES


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_a_saved_folder_answers_the_same_without_this_package(tmp_path, python, auto_class):
    if auto_class == "AutoModelForCausalLM":
        model = tiny_model(**MODES[2])
    else:
        model = InfiniForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "saved")
    found = load_elsewhere(tmp_path / "elsewhere", tmp_path / "saved", auto_class, python)
    assert found == [expected_answer(model)]


def test_a_head_can_be_put_on_a_published_language_model(tmp_path):
    tiny_model(pad_token_id=0).save_pretrained(tmp_path / "saved")
    found = load_elsewhere(
        tmp_path / "elsewhere", tmp_path / "saved", "AutoModelForSequenceClassification", options=[{"num_labels": 3}]
    )
    assert torch.tensor(found).shape == (1, 2, 3)


def test_a_configuration_saved_where_it_came_from_keeps_the_code(tmp_path):
    tiny_model().save_pretrained(tmp_path / "ours")
    for _ in range(2):
        InfiniForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "ours")
    resave = "from transformers import AutoConfig; c = AutoConfig.from_pretrained('ours', trust_remote_code=True);"
    resave += "c.save_pretrained('ours'); c.save_pretrained('new')"
    run(tmp_path, [sys.executable, "-c", resave])
    for name in ("ours", "new"):
        assert {file.name for file in (tmp_path / name).glob("*.py")} == CODE_FILES
        assert json.loads((tmp_path / name / "config.json").read_text())["auto_map"].keys() == AUTO_CLASSES


def test_a_file_of_the_users_own_is_not_overwritten(tmp_path):
    (tmp_path / "memory.py").write_text("MINE = 1")
    with pytest.raises(FileExistsError, match=r"memory\.py would be overwritten"):
        tiny_model().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["memory.py"]
    assert (tmp_path / "memory.py").read_text() == "MINE = 1"
    tiny_model().save_pretrained(tmp_path / "saved")
    # The code of a model that another version saved here.
    (tmp_path / "saved" / "memory.py").write_text("OLD = 1")
    tiny_model().save_pretrained(tmp_path / "saved")
    assert "OLD" not in (tmp_path / "saved" / "memory.py").read_text()


def test_what_was_loaded_by_its_code_saves_its_code_again(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    load_elsewhere(tmp_path / "first", tmp_path / "saved", save_to=[tmp_path / "again"])
    shutil.rmtree(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == CODE_FILES
    assert load_elsewhere(tmp_path / "second", tmp_path / "again") == [expected_answer(model)]


def test_a_card_says_what_the_model_is():
    config = tiny_config(**MODES[2], use_mem_delta_rule=True, num_hidden_layers=1)
    shares = torch.tensor([[0.25, 0.75, 0.5, 0.5]])
    card = model_card(config, shares, repo_id="me/mine", base_model="base/model", license="mit", training="By hand.")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["infini-attention", "long-context", "custom_code"],
        "base_model": "base/model",
        "license": "mit",
    }
    for words in ("# mine", "By hand.", "sliding window of 5 tokens and 2 attention sinks", "delta", "25.0% to 75.0%"):
        assert words in card.text
    assert f"{state_nbytes(config) / 1e6:.1f} MB" in card.text


def test_layers_without_a_memory_have_no_gates_on_the_card():
    config = tiny_config(num_hidden_layers=2, memory_layers=[1])
    shares = torch.tensor([[1.0] * 4, [0.25, 0.75, 0.5, 0.5]])
    assert "50.0% on average, 25.0% to 75.0%" in model_card(config, shares).text
    assert "no gates" in model_card(tiny_config(num_hidden_layers=2, memory_layers=[]), shares).text


@pytest.mark.parametrize("name", MODEL_CLASSES)
def test_every_class_has_a_task_of_the_hub_and_an_auto_class_on_its_card(name):
    model = getattr(modeling_infini, name)(tiny_config())
    model.config.architectures = [name]
    card = model_card(model.config, model.local_shares())
    assert ("A causal language model" in card.text) == (name == "InfiniForCausalLM")
    # transformers has dropped the pipeline of the last, the Hub keeps its task.
    assert card.data.pipeline_tag in {*SUPPORTED_TASKS, "question-answering"}
    auto_class = card.text.split("from transformers import ")[1].split(",")[0]
    assert auto_class in AUTO_CLASSES
    assert auto_class.removeprefix("AutoModel") == name.removeprefix("Infini").removeprefix("Model")


@pytest.mark.parametrize("fields", MODES)
def test_the_state_on_the_card_is_what_a_cache_holds(fields):
    model = tiny_model(**fields)
    with torch.no_grad():
        cache = model(random_ids(1, 23), use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in layer.states().values()]
    assert state_nbytes(model.config) == sum(tensor.nbytes for tensor in tensors)


PUSH = """
import sys
from modeling_infini import InfiniForCausalLM
for folder, branch in zip(sys.argv[1::2], sys.argv[2::2]):
    model = InfiniForCausalLM.from_pretrained(folder)
    print(model.push_to_hub("infini-tiny", revision=branch or None, tags=["tiny", "long-context"]).oid)
"""


def test_published_and_loaded_by_name_at_a_pinned_revision(tmp_path, monkeypatch, python):
    first, second, third = tiny_model(seed=1), tiny_model(seed=2), tiny_model(seed=3)
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        push = [sys.executable, "-c", PUSH]
        for name, model, branch in (("first", first, ""), ("second", second, ""), ("third", third, "trial")):
            model.save_pretrained(tmp_path / name)
            push += [str(tmp_path / name), branch]
        commits = run(tmp_path / "author", push, HF_TOKEN=TOKEN).split()
        assert len(hub.uploads) == 3

        repository = f"{USER}/infini-tiny"
        files = hub.repositories[repository].commits[commits[0]]
        assert {"README.md", "config.json", "generation_config.json", "model.safetensors", *CODE_FILES} == set(files)
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "transformers"
        assert card.data.tags == ["infini-attention", "long-context", "custom_code", "tiny"]
        assert f'AutoModelForCausalLM.from_pretrained("{repository}", trust_remote_code=True)' in card.text

        reader = tmp_path / "reader"
        options = [{"revision": commits[0]}, {}, {"revision": "main"}, {"revision": "trial"}]
        answers = load_elsewhere(reader, repository, python=python, options=options)
        assert answers == [expected_answer(model) for model in (first, second, second, third)]
        if FINDS_PINNED_FILES_ALONE:
            # A pinned revision needs no Hub once it was read.
            hub.repositories.clear()
            assert load_elsewhere(reader, repository, python=python, options=options[:1]) == answers[:1]


PUSH_BY_ITS_CODE = """
import sys
if sys.argv[2] == "alone":
    sys.modules["infini_transformers"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
print(model.push_to_hub(sys.argv[2]).oid)
"""


@pytest.mark.parametrize("name", ["alone", "with-the-package"])
def test_what_was_loaded_by_its_code_is_pushed_with_a_card(tmp_path, monkeypatch, name):
    tiny_model().save_pretrained(tmp_path / "saved")
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        push = [sys.executable, "-c", PUSH_BY_ITS_CODE, str(tmp_path / "saved"), name]
        commit = run(tmp_path / "author", push, HF_TOKEN=TOKEN).strip()
        files = hub.repositories[f"{USER}/{name}"].commits[commit]
    assert set(files) >= CODE_FILES
    text = ModelCard(files["README.md"].decode()).text
    assert ("share of local attention in the gates" in text) == (name == "with-the-package")


CONVERT = """
import sys
from infini_transformers.conversion import convert_to_infini
convert_to_infini(sys.argv[1], sys.argv[2], segment_length=9, revision=sys.argv[3])
"""

INSPECT = "from infini_transformers.conversion.__main__ import app; import sys; app(sys.argv[1:])"


def test_a_model_of_the_hub_is_converted_with_its_provenance(tmp_path, monkeypatch):
    base = base_model("qwen3", num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    ModelCard(f"---\n{ModelCardData(license='other', license_name='qwen').to_yaml()}\n---\nA base.").save(
        tmp_path / "base" / "README.md"
    )
    for name in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors"):
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(b"not to be downloaded")
    (tmp_path / "base" / "LICENSE").write_text("A licence.")
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.add(f"{USER}/base", tmp_path / "base")
        convert = [sys.executable, "-c", CONVERT, f"{USER}/base", str(tmp_path / "ours"), commit]
        run(tmp_path / "reader", convert)
        fetched = {file.name for file in (tmp_path / "reader").glob("cache/hub/models--*/snapshots/*/**/*")}
        assert not fetched & {"pytorch_model.bin", "consolidated.safetensors", "original"}
        assert (tmp_path / "ours" / "LICENSE").read_text() == "A licence."
        missing = [sys.executable, "-c", INSPECT, "to-infini", f"{USER}/none", "never", "--segment-length", "9"]
        done = subprocess.run(missing, cwd=tmp_path, text=True, capture_output=True, check=False)
        assert done.returncode == 1
        assert "Repository Not Found" in done.stderr
    ours = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(ours(random_ids(2, 9)).logits, base(random_ids(2, 9)).logits)
    assert (
        ours.config.converted_from.items()
        >= {
            "name": f"{USER}/base",
            "model_type": "qwen3",
            "revision": commit,
            "license": "other",
            "license_name": "qwen",
        }.items()
    )
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    assert (card.data.base_model, card.data.license, card.data.license_name) == (f"{USER}/base", "other", "qwen")
    assert commit in card.text


LOAD_BASE = """
import sys
import torch
from modeling_infini import InfiniForCausalLM
name, revision, output = sys.argv[1:]
model = InfiniForCausalLM.from_pretrained(name, segment_length=9, revision=revision, cache_dir="elsewhere")
assert model.config.name_or_path == ""
model.save_pretrained(output)
# Without the Hub, by what was downloaded.
options = {"revision": revision, "cache_dir": "elsewhere", "local_files_only": True}
again = InfiniForCausalLM.from_pretrained(name, segment_length=9, **options)
ids = torch.arange(30).unsqueeze(0)
assert torch.equal(again(ids).logits, model(ids).logits)
"""


def test_a_base_of_the_hub_is_converted_while_it_is_loaded(tmp_path, monkeypatch):
    base_model("qwen3", num_hidden_layers=1).save_pretrained(tmp_path / "base", max_shard_size="5KB")
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.add(f"{USER}/base", tmp_path / "base")
        loading = [sys.executable, "-c", LOAD_BASE, f"{USER}/base", commit, str(tmp_path / "saved")]
        run(tmp_path / "reader", loading)
        run(tmp_path / "reader", [sys.executable, "-c", CONVERT, f"{USER}/base", str(tmp_path / "ours"), commit])
    saved, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "ours"))
    assert saved == ours
    assert (saved["converted_from"]["name"], saved["converted_from"]["revision"]) == (f"{USER}/base", commit)


@pytest.mark.parametrize("safetensors", [True, False])
def test_pickles_of_the_hub_are_read_where_there_is_nothing_else(tmp_path, monkeypatch, safetensors):
    base = base_model(num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    if safetensors:
        (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"not to be read")
    else:
        (tmp_path / "base" / "model.safetensors").unlink()
        torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.add(f"{USER}/base", tmp_path / "base")
        options = [f"{USER}/base", str(tmp_path / "ours"), "--segment-length", "9", "--revision", commit]
        run(tmp_path / "reader", [sys.executable, "-c", INSPECT, "to-infini", *options, "--allow-bin"])
    with torch.no_grad():
        ours = InfiniForCausalLM.from_pretrained(tmp_path / "ours")
        assert torch.equal(ours(random_ids(2, 9)).logits, base(random_ids(2, 9)).logits)


CONFIG_ALONE = """
import sys
from transformers import AutoConfig, AutoModelForSequenceClassification
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained("alone")
config = AutoConfig.from_pretrained("alone", trust_remote_code=True)
print(type(AutoModelForSequenceClassification.from_config(config, trust_remote_code=True)).__name__)
"""


def test_a_configuration_loaded_alone_still_knows_its_models(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "ours")
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(f"{USER}/infini-tiny", tmp_path / "ours")
        done = run(tmp_path / "reader", [sys.executable, "-c", CONFIG_ALONE, f"{USER}/infini-tiny"])
    assert done.strip() == "InfiniForSequenceClassification"
