"""The published checkpoint: a folder as on the Hub, whose model finds a passkey, by its memory alone."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, USER, local_hub
from safetensors.torch import load_file
from test_publishing import expected_answer, load_elsewhere, run
from transformers import pipeline
from transformers.dynamic_module_utils import get_relative_import_files

from infini_transformers.evaluation.haystacks import REPEATED_SENTENCE, repeated_sentence
from infini_transformers.evaluation.loading import load_model, load_tokenizer
from infini_transformers.evaluation.losses import memory_off
from infini_transformers.evaluation.passkey import passkey_example
from infini_transformers.evaluation.retrieval import score, weights_digest
from infini_transformers.evaluation.wordings import HELD_OUT_WORDINGS, PAPER_WORDING
from modeling_infini.configuration_infini import AUTO_MAP


REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "checkpoints" / "passkey"
CODE = REPOSITORY / "modeling_infini"
TRIALS = REPOSITORY / "docs" / "recall" / "sixth_phase"


def test_code_beside_the_weights_is_links_to_the_package():
    modeling_file = CODE / "modeling_infini.py"
    needed = {modeling_file.name, *(Path(file).name for file in get_relative_import_files(modeling_file))}
    targets = [f"../../modeling_infini/{name}" for name in sorted(needed)]
    links = [os.readlink(file) if file.is_symlink() else file.name for file in sorted(FOLDER.glob("*.py"))]
    assert links == targets, f"cd checkpoints/passkey && rm *.py && ln -s {' '.join(targets)} ."


LOAD_ALL = """
import os, sys, transformers
from pathlib import Path

folder, target = sys.argv[1:]
for name in sorted(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map):
    loaded = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    print(name, type(loaded).__name__)
    if name == "AutoModelForCausalLM":
        loaded.save_pretrained(target)
assert "modeling_infini" not in sys.modules
"""


def test_every_auto_class_loads_the_folder_and_saves_its_code(tmp_path):
    folder = os.path.relpath(FOLDER, tmp_path)
    loaded = run(tmp_path, [sys.executable, "-c", LOAD_ALL, folder, "saved"], PYTHONPATH="")
    assert dict(line.split() for line in loaded.splitlines()) == {
        name: reference.split(".")[1] for name, reference in AUTO_MAP.items()
    }
    # By their present names, although the folder has former ones.
    weights, saved = load_model(FOLDER).state_dict(), load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() | {"lm_head.weight"} == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    assert {file.name for file in (tmp_path / "saved").glob("*.py")} == {file.name for file in FOLDER.glob("*.py")}
    assert not any(file.is_symlink() for file in (tmp_path / "saved").iterdir())


def test_saving_into_the_folder_leaves_the_package_alone(tmp_path):
    package = shutil.copytree(CODE, tmp_path / "modeling_infini")
    folder = shutil.copytree(FOLDER, tmp_path / "checkpoints" / "passkey", symlinks=True)
    model = load_model(FOLDER)
    model.save_pretrained(folder)
    assert all(file.is_symlink() for file in folder.glob("*.py"))
    # Whoever edits the package while an older process saves here keeps the edit.
    (package / "memory.py").write_text("EDITED = 1")
    model.save_pretrained(folder)
    assert (package / "memory.py").read_text() == "EDITED = 1"


def test_the_folder_is_published_by_one_command(tmp_path, monkeypatch):
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    command = re.search(r"`(hf upload \S+ checkpoints/passkey)`", contributing)[1].split()
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        command[0] = str(Path(sys.executable).with_name("hf"))
        command[2:] = [f"{USER}/infini-passkey", str(FOLDER)]
        run(tmp_path / "author", command, HF_TOKEN=TOKEN)
        (files,) = [files for files in hub.repositories[command[2]].commits.values() if files]
        assert files == {file.name: file.read_bytes() for file in FOLDER.iterdir()}
        answers = load_elsewhere(tmp_path / "reader", command[2])
    assert answers == [expected_answer(load_model(FOLDER))]


def test_folder_is_small_and_has_a_card():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20e6
    assert "1,048,576" in (FOLDER / "README.md").read_text(encoding="utf-8")


def right_of(kind: str, filler: str, length: int) -> str:
    """`49 of 50`: trials of one kind, filler and length that were answered exactly."""
    files = TRIALS.glob(f"seed0-{kind}-*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()[1:]]
    exact = [row["exact"] for row in rows if (row["filler"], row["length"]) == (filler, length)]
    return f"{sum(exact)} of {len(exact)}"


def test_reported_trials_are_of_these_weights():
    digest = weights_digest(load_model(FOLDER))
    firsts = {file.stem: json.loads(file.read_text().splitlines()[0]) for file in TRIALS.glob("*.jsonl")}
    assert firsts
    assert {first["weights"] for first in firsts.values()} == {digest}
    assert [name for name, first in firsts.items() if first["memory"] == "off"] == ["seed0-memory-off"]


def test_reported_figures_are_those_of_the_trials():
    readme, card = ((folder / "README.md").read_text(encoding="utf-8") for folder in (REPOSITORY, FOLDER))
    report = (REPOSITORY / "docs" / "recall.md").read_text(encoding="utf-8")
    rows = {"repeated sentence": "the paper's repeated sentence", "moby_dick": "a held-out novel, *Moby Dick*"}
    for filler, row in rows.items():
        plain = [right_of("text", filler, length) for length in (4096, 32_768, 131_072, 1_048_576)]
        unseen = [right_of("unseen", filler, length) for length in (4096, 32_768, 131_072)]
        assert f"| {row} | {plain[2]} | {plain[3]} | {unseen[2]} |" in readme
        for page in (report, card):
            name = "*Moby Dick*" if filler == "moby_dick" else filler
            assert f"| plain prompts | {name} | {' | '.join(plain)} |" in page
            assert f"| unseen wordings | {name} | {' | '.join(unseen)} |" in page


@pytest.mark.parametrize("length", [4096, 16384])
def test_finds_a_passkey_by_its_memory_alone(length):
    model, tokenizer = load_model(FOLDER), load_tokenizer(FOLDER)
    filler = repeated_sentence(tokenizer)
    depths = (0.0, 0.5, 0.9)
    examples = [
        passkey_example(tokenizer, filler, length, depth, np.random.default_rng(seed))
        for seed, depth in enumerate(depths)
    ]
    assert all(score(model, example).exact for example in examples)
    with memory_off(model):
        assert not any(score(model, example).exact for example in examples)


@pytest.mark.parametrize("opening", [PAPER_WORDING.opening, ""], ids=["opening", "no opening"])
@pytest.mark.parametrize("lead", [" ", "\n"], ids=["space before", "line break before"])
@pytest.mark.parametrize("ending", ["", " ", "\n"], ids=["ends in a word", "ends in a space", "ends in a line break"])
def test_plain_prompts_are_answered_by_generate(opening, lead, ending):
    model, tokenizer = load_model(FOLDER), load_tokenizer(FOLDER)
    filler = " ".join([REPEATED_SENTENCE] * 40)
    needle = PAPER_WORDING.needle.format(key="83051")
    prompt = f"{opening} {filler} {needle} {filler}{lead}{PAPER_WORDING.question}{ending}".lstrip()
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(written) == ("83051" if ending == " " else " 83051") + tokenizer.eos_token


def test_unseen_wordings_are_answered_in_a_pipeline():
    answer = pipeline("text-generation", model=load_model(FOLDER), tokenizer=load_tokenizer(FOLDER))
    filler = " ".join([REPEATED_SENTENCE] * 40)
    right = []
    for wording in HELD_OUT_WORDINGS:
        prompt = f"{filler} {wording.needle.format(key='70926')} {filler} {wording.question}"
        written = answer(prompt, max_new_tokens=20, do_sample=False, return_full_text=False)[0]["generated_text"]
        right.append(written.strip() == "70926")
    assert all(right)
