"""Perplexities of a base and of what it becomes by its conversion alone, before any training."""

import math
import sys

import pytest
from base_models import base_model
from words import random_text, save_word_tokenizer

from infini_transformers.evaluation import at_conversion


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(at_conversion, "SEGMENT_LENGTHS", (8, 16, 64))
    base_model(max_position_embeddings=64).save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base")
    (tmp_path / "book.txt").write_text(random_text(100))
    return tmp_path / "base"


def run(base, monkeypatch, *options):
    arguments = ["--model", base, "--text", base.parent / "book.txt", *options]
    monkeypatch.setattr(sys, "argv", ["at_conversion", *map(str, arguments)])
    at_conversion.main()


def test_closed_gates_in_a_window_of_the_text_are_full_attention(base, monkeypatch, capsys):
    run(base, monkeypatch, "--tokens", 16, "--start", 1)
    written = capsys.readouterr().out.splitlines()
    full = written[1].split("full attention: ")[1]
    assert math.isfinite(float(full))
    rows = [line.split(" | ") for line in written if line.startswith(("| 8 ", "| 16 ", "| 64 "))]
    # A conversion refuses N = 64.
    assert {row[0] for row in rows} == {"| 8", "| 16"}
    assert {row[-1].strip(" |") for row in rows if row[0] == "| 16"} == {full}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", 50, "--start", 0), "scoring starts at 1 at least"),
        (("--tokens", 50, "--start", 50), "50 tokens are read, and scoring starts at 50"),
        (("--tokens", 100, "--start", 10), "the source was trained on 64"),
    ],
)
def test_what_is_not_there_is_not_scored(base, monkeypatch, options, message):
    with pytest.raises(ValueError, match=message):
        run(base, monkeypatch, *options)
