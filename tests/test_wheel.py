"""What is published: an sdist, and a wheel that works where nothing of this repository is."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from base_models import base_model
from packaging.metadata import Metadata
from words import random_text, save_word_tokenizer

from infini_transformers import __version__


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOT_COPIED = (".*", "*.egg-info", "__pycache__", "build", "dist", "site", "checkpoints", "demo-output")


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_COPIED))
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=folder / "source")
    (file,) = folder.glob("*.tar.gz")
    return file


@pytest.fixture(scope="module")
def wheel(sdist):
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", sdist.parent)
    run(sys.executable, "-m", "pip", "wheel", *options, sdist)
    (file,) = sdist.parent.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder of the commands of an environment that has the wheel, what it needs, and nothing of this clone."""
    folder = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # Its finder of this clone is in a .pth file, which is not read there.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "what-it-needs.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The present folder, with what the README names."""
    base_model(max_position_embeddings=2048).save_pretrained(tmp_path / "path/to/llama")
    tokens = {"eos_token": "w1", "pad_token": "w0", "model_input_names": ["input_ids", "attention_mask"]}
    save_word_tokenizer(tmp_path / "path/to/llama", **tokens)
    (tmp_path / "book.txt").write_text(random_text(90))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def test_the_sdist_holds_what_makes_the_wheel(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    assert {"conversion/to_infini.py", "evaluation/lm_eval_tasks/documents.yaml"} <= names
    assert not {name.partition("/")[0] for name in names} & {"tests", "checkpoints", "docs"}


def test_what_is_imported_is_declared():
    """The environment of these tests has more than a user's: that all imports succeed here says nothing."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared, with_vllm = (
        {re.split(r"[<>=\[]", line)[0] for line in lines}
        for lines in (project["dependencies"], project["optional-dependencies"]["vllm"])
    )
    modules = {"yaml": "pyyaml"}
    # For the harness, which brings it.
    of_the_harness = ROOT / "evaluation" / "lm_eval_tasks"
    for package in ("infini_transformers", "conversion", "evaluation", "modeling_infini", "vllm_infini"):
        of_package = declared | with_vllm if package == "vllm_infini" else declared
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                outside = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
                outside -= {"infini_transformers", "modeling_infini"}
                if of_the_harness not in file.parents:
                    assert {modules.get(name, name) for name in outside} <= of_package, file


def test_the_wheel_takes_three_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name) for name in names if name.endswith(".dist-info/METADATA"))
    taken = {"infini_transformers", "modeling_infini", "vllm_infini"}
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == taken
    for package in (*taken, "conversion", "evaluation"):
        place = package if package in taken else f"infini_transformers/{package}"
        assert {f"{place}/{file.relative_to(ROOT / package)}" for file in (ROOT / package).rglob("*.py")} <= set(names)
    assert "infini_transformers/evaluation/lm_eval_tasks/documents.yaml" in names
    Metadata.from_email(metadata, validate=True)
    assert email.message_from_bytes(metadata)["Version"] == __version__


def test_nothing_of_the_clone_is_there(installed, elsewhere):
    find = "import importlib.util, sys; print(*map(importlib.util.find_spec, sys.argv[1:]), sep='\\n')"
    names = ("modeling_infini", "infini_transformers.evaluation", "conversion", "evaluation", "tests", "benchmarks")
    found = run(installed / "python", "-c", find, *names).splitlines()
    assert all(str(installed.parent) in spec for spec in found[:2])
    assert found[2:] == ["None"] * 4


def test_the_readme_runs(installed, elsewhere):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    run(installed / "python", "-c", code)


def test_the_command_runs(installed, elsewhere):
    infini = installed / "infini"
    assert "commands:" in run(infini, "--help")
    assert "Converted" in run(infini, "convert", "path/to/llama", "by-command", "--segment-length", 16)
    # As the published code, whose files are found in the installed package.
    assert (elsewhere / "by-command" / "modeling_infini.py").is_file()
    run(infini, "read", "by-command", "book.txt", "--save-memory", "memory", "--max-new-tokens", 3)
    assert os.listdir("memory")
