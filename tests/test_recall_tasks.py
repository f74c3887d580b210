"""Tasks of recall: every text holds what it asks for, where it says, and its answers are where they are said to be."""

import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from infini_transformers.evaluation.haystacks import REPEATED_SENTENCE, Filler, encode, repeated_sentence
from infini_transformers.evaluation.mqar import mqar_example
from infini_transformers.evaluation.needle import (
    CITIES,
    DEEDS,
    KINDS,
    NUM_DECOYS,
    THINGS,
    needle_example,
    number_example,
)
from infini_transformers.evaluation.passkey import DECOYS, NEAR, NUM_DIGITS, passkey_example, passkey_text_example
from infini_transformers.evaluation.variable_tracking import variable_tracking_example
from infini_transformers.evaluation.wordings import (
    HELD_OUT_WORDINGS,
    PAPER_WORDING,
    TRAINING_WORDINGS,
    borrow_wording,
    draw_plain_wording,
    draw_wording,
)


LENGTH = 700
BOS = "<s>"
DEPTHS = (0.0, 0.27, 0.5, 1.0)
# With the default arguments; passkey and needle at a depth.
TASKS = {
    "passkey": lambda tokenizer, filler, length, generator: passkey_example(tokenizer, filler, length, 0.4, generator),
    "passkey with decoys": lambda tokenizer, filler, length, generator: passkey_example(
        tokenizer, filler, length, 0.4, generator, TRAINING_WORDINGS[3], num_decoys=3
    ),
    "needle": lambda tokenizer, filler, length, generator: needle_example(tokenizer, filler, length, 0.4, generator),
    "needles": lambda tokenizer, filler, length, generator: needle_example(
        tokenizer, filler, length, 0.4, generator, NUM_DECOYS
    ),
    "numbers": lambda tokenizer, filler, length, generator: number_example(tokenizer, filler, length, 0.4, generator),
    "mqar": mqar_example,
    "variable tracking": variable_tracking_example,
}


def byte_level_tokenizer(single_digits, bos=False):
    """BPE of a few hundred tokens. Where digits merge, a number of five takes fewer tokens than that."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    numbers = " ".join(map(str, np.random.default_rng(0).integers(10**5, size=500)))
    words = [text for wording in (*TRAINING_WORDINGS, *HELD_OUT_WORDINGS) for text in wording]
    tokenizer.train_from_iterator(
        [numbers, REPEATED_SENTENCE, *words, *DECOYS],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS)


TOKENIZERS = {
    "single digits": {"single_digits": True},
    "merged digits": {"single_digits": False},
    "with BOS": {"single_digits": True, "bos": True},
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return byte_level_tokenizer(**TOKENIZERS[request.param])


@pytest.fixture(scope="module")
def filler(tokenizer):
    return repeated_sentence(tokenizer)


def opening_of(tokenizer):
    """Tokens before every text."""
    return [tokenizer.bos_token_id] if tokenizer("").input_ids else []


def text_of(tokenizer, ids):
    """Without BOS."""
    return tokenizer.decode(ids).removeprefix(BOS)


def set_off(text):
    """A piece as it stands after another one."""
    return text if text[:1].isspace() else f" {text}"


def find(ids, piece):
    """Where the only occurrence of a piece starts."""
    (start,) = ids.unfold(0, len(piece), 1).eq(piece).all(1).nonzero().flatten().tolist()
    return start


def assert_asked_at_the_end(tokenizer, example, question):
    """All tokens of the answer are asked for, and none else; before them comes the question."""
    ids, positions = example.input_ids, example.answer_positions
    assert positions.tolist() == list(range(positions[0], len(ids)))
    assert tokenizer.decode(ids[positions]).lstrip() == example.facts["answer"]
    assert tokenizer.decode(ids[: positions[0]]).rstrip().endswith(set_off(question))


def assert_at_depth(depth, before, after):
    """Tokens of filler before and after a piece are as near to its depth as whole tokens come."""
    assert min(before, after) >= 0
    assert abs(before - depth * (before + after)) <= 0.5


def test_tokenizers_are_what_they_are_said_to_be():
    single, merged, bos = (byte_level_tokenizer(**options) for options in TOKENIZERS.values())
    assert len(single.tokenize("12345")) == 5
    assert 1 < len(merged.tokenize("12345")) < 5
    assert single("a").input_ids == encode(single, "a").tolist()
    assert bos("a").input_ids == [bos.bos_token_id, *encode(bos, "a").tolist()]


@pytest.mark.parametrize("task", TASKS)
class TestEveryTask:
    @pytest.mark.parametrize("length", [LENGTH, LENGTH + 1, 2 * LENGTH])
    def test_length_is_exact(self, tokenizer, filler, task, length):
        example = TASKS[task](tokenizer, filler, length, np.random.default_rng(0))
        assert example.input_ids.shape == (length,)
        assert example.input_ids.dtype == example.answer_positions.dtype == torch.long
        assert example.answer_positions.ndim == 1
        assert len(example.answer_positions) > 0

    def test_generator_decides(self, tokenizer, filler, task):
        one, same, other = (TASKS[task](tokenizer, filler, LENGTH, np.random.default_rng(seed)) for seed in (0, 0, 1))
        assert torch.equal(one.input_ids, same.input_ids)
        assert torch.equal(one.answer_positions, same.answer_positions)
        assert one.facts == same.facts
        assert not torch.equal(one.input_ids, other.input_ids)
        assert one.input_ids[one.answer_positions].tolist() != other.input_ids[other.answer_positions].tolist()

    def test_one_generator_gives_ever_new_examples(self, tokenizer, filler, task):
        generator = np.random.default_rng(0)
        answers = set()
        for _ in range(8):
            example = TASKS[task](tokenizer, filler, LENGTH, generator)
            answers.add(tuple(example.input_ids[example.answer_positions].tolist()))
        assert len(answers) == 8

    def test_bos_stands_first_if_the_tokenizer_adds_one(self, tokenizer, filler, task):
        ids = TASKS[task](tokenizer, filler, LENGTH, np.random.default_rng(0)).input_ids
        expected = [0] if opening_of(tokenizer) else []
        assert (ids == tokenizer.bos_token_id).nonzero().flatten().tolist() == expected

    def test_too_short_a_length_is_refused_with_the_least_one(self, tokenizer, filler, task):
        def example(length):
            return TASKS[task](tokenizer, filler, length, np.random.default_rng(3))

        with pytest.raises(ValueError, match="7 are too few") as error:
            example(7)
        (least,) = map(int, re.findall(r"takes (\d+) tokens", str(error.value)))
        assert example(least).input_ids.shape == (least,)
        with pytest.raises(ValueError, match=f"takes {least} tokens: {least - 1} are too few"):
            example(least - 1)


@pytest.mark.parametrize("wording", [*TRAINING_WORDINGS, *HELD_OUT_WORDINGS], ids=lambda wording: wording.question)
class TestPasskey:
    @pytest.mark.parametrize("depth", DEPTHS)
    def test_number_is_hidden_at_its_depth_and_asked_for(self, tokenizer, filler, wording, depth):
        example = passkey_example(tokenizer, filler, LENGTH, depth, np.random.default_rng(0), wording)
        ids, key = example.input_ids, example.facts["answer"]
        assert example.facts == {"depth": depth, "answer": key}
        assert re.fullmatch(r"\d{5}", key)
        assert_asked_at_the_end(tokenizer, example, wording.question)

        text = text_of(tokenizer, ids)
        hidden = wording.needle.format(key=key)
        assert text.startswith(wording.opening)
        assert text.count(set_off(hidden)) == 1
        # No digits but those that are hidden and asked for.
        assert re.findall(r"\d+", text) == [key] * (hidden.count(key) + 1)

        piece, end = encode(tokenizer, set_off(hidden)), encode(tokenizer, set_off(wording.question))
        start, end_start = find(ids, piece), find(ids, end)
        before = start - len(opening_of(tokenizer)) - len(encode(tokenizer, wording.opening))
        assert_at_depth(depth, before, end_start - start - len(piece))

    def test_every_digit_is_asked_for(self, tokenizer, filler, wording):
        for seed in range(20):
            example = passkey_example(tokenizer, filler, LENGTH, 0.5, np.random.default_rng(seed), wording)
            assert_asked_at_the_end(tokenizer, example, wording.question)
            tokens = [tokenizer.decode([token]) for token in example.input_ids[example.answer_positions]]
            assert all(re.search(r"\d", token) for token in tokens)
            if len(encode(tokenizer, "12345")) == NUM_DIGITS:
                # The space before is no part of the answer where it is a token of its own.
                assert tokens == list(example.facts["answer"])

    @pytest.mark.parametrize("depth", DEPTHS)
    def test_decoys_change_neither_answer_nor_depth(self, tokenizer, filler, wording, depth):
        plain, example = (
            passkey_example(tokenizer, filler, LENGTH, depth, np.random.default_rng(5), wording, num_decoys)
            for num_decoys in (0, 6)
        )
        assert example.facts == plain.facts
        assert torch.equal(example.answer_positions, plain.answer_positions)
        ids, key = example.input_ids, example.facts["answer"]
        assert torch.equal(ids[example.answer_positions], plain.input_ids[plain.answer_positions])
        assert_asked_at_the_end(tokenizer, example, wording.question)

        text = text_of(tokenizer, ids)
        hidden = wording.needle.format(key=key)
        sentence = "|".join(re.escape(decoy).replace(r"\{key\}", r"\d{5}") for decoy in DECOYS)
        decoys = list(re.finditer(f" (?:{sentence})", text))
        assert len(decoys) == 6
        assert text.count(set_off(hidden)) == 1
        numbers = re.findall(r"\d+", text)
        assert numbers.count(key) == hidden.count(key) + 1
        assert len(numbers) == numbers.count(key) + 6

        def tokens_of(matches):
            return sum(len(encode(tokenizer, match.group())) for match in matches)

        piece, end = encode(tokenizer, set_off(hidden)), encode(tokenizer, set_off(wording.question))
        start, end_start = find(ids, piece), find(ids, end)
        decoys_before = tokens_of(match for match in decoys if match.start() < text.index(set_off(hidden)))
        before = start - len(opening_of(tokenizer)) - len(encode(tokenizer, wording.opening)) - decoys_before
        after = end_start - start - len(piece) - (tokens_of(decoys) - decoys_before)
        assert_at_depth(depth, before, after)


class TestPasskeyWordings:
    def test_near_decoys_stand_around_the_number(self, tokenizer, filler):
        distances = []
        for seed in range(20):
            generator = np.random.default_rng(seed)
            length = 5000
            example = passkey_example(tokenizer, filler, length, 0.5, generator, num_decoys=1, near_decoys=1.0)
            text = tokenizer.decode(example.input_ids)
            needle = PAPER_WORDING.needle.format(key=example.facts["answer"])
            before, after = text.split(needle)
            pattern = "|".join(decoy.replace("{key}", r"\d{5}") for decoy in DECOYS)
            ((side, match),) = [(side, match) for side in (before, after) for match in re.finditer(pattern, side)]
            gap = side[match.end() :] if side is before else side[: match.start()]
            distances.append(len(tokenizer(gap).input_ids) * (-1 if side is before else 1))
        assert max(map(abs, distances)) <= NEAR + 2
        assert min(distances) < 0 < max(distances)

    def test_training_has_the_paper_s_and_none_of_those_held_out(self):
        assert PAPER_WORDING in TRAINING_WORDINGS
        for part in ("needle", "question"):
            texts = [getattr(wording, part) for wording in (*TRAINING_WORDINGS, *HELD_OUT_WORDINGS)]
            assert len(set(texts)) == len(texts)

    def test_the_grammar_has_ever_new_wordings_and_all_forms(self):
        generator = np.random.default_rng(0)
        wordings = [draw_wording(generator) for _ in range(1000)]
        assert len({wording.needle for wording in wordings}) > 800
        assert len({wording.question for wording in wordings}) > 800
        assert all("12345" in wording.needle.format(key="12345") for wording in wordings)
        assert not any("{" in wording.opening + wording.question for wording in wordings)
        forms = {
            (wording.opening == "", wording.question[0] == "\n", wording.question.rstrip()[-1] == "?")
            for wording in wordings
        }
        assert len(forms) == 8
        assert {wording.question[-1] for wording in wordings} >= {" ", "\n", "s", ":", "?"}

    def test_the_grammar_has_none_of_the_words_that_are_held_out(self):
        generator = np.random.default_rng(0)
        drawn = " ".join(" ".join(draw_wording(generator)) for _ in range(3000)).lower()
        for words in ("magic", "account", "password", "badge", "regist", "alarm", "verification", "digits", "reply"):
            assert any(words in " ".join(wording).lower() for wording in HELD_OUT_WORDINGS)
            assert words not in drawn

    def test_borrowed_words_are_those_of_the_text_without_digits_or_braces(self):
        generator = np.random.default_rng(0)
        words = ["In", "1815", "the", "{name}", "of", "Emma", "Woodhouse", "was", "handsome", "clever", "and", "rich"]
        wordings = [borrow_wording(words, generator) for _ in range(300)]
        for wording in wordings:
            assert wording.opening == ""
            assert 1 <= wording.needle.count("{key}") <= 2
            said = re.findall(r"[\w{}]+", f"{wording.needle} {wording.question}".replace("{key}", ""))
            assert set(said) <= set(words) - {"1815", "{name}"}
        assert {wording.question[-1] for wording in wordings if wording.question} >= {" ", "\n", ":"}

    def test_plain_wordings_are_the_paper_s_in_all_forms(self):
        generator = np.random.default_rng(0)
        wordings = {draw_plain_wording(generator) for _ in range(200)}
        assert {wording.question.strip() for wording in wordings} == {PAPER_WORDING.question}
        assert {wording.needle for wording in wordings} == {PAPER_WORDING.needle}
        assert len(wordings) == 2 * 2 * 3

    def test_numbers_may_start_with_any_digit(self, tokenizer, filler):
        generator = np.random.default_rng(0)
        keys = [passkey_example(tokenizer, filler, LENGTH, 0.5, generator).facts["answer"] for _ in range(100)]
        assert {key[0] for key in keys} == set("0123456789")


class TestPasskeyAsText:
    @pytest.mark.parametrize("ending", ["", " ", "\n"])
    @pytest.mark.parametrize("lead", ["", "\n"])
    def test_prompt_is_what_the_tokenizer_makes_of_the_text(self, tokenizer, filler, lead, ending):
        wording = PAPER_WORDING._replace(question=f"{lead}{PAPER_WORDING.question}{ending}")
        for seed in range(10):
            example = passkey_text_example(tokenizer, filler, LENGTH, 0.4, np.random.default_rng(seed), wording)
            key, start = example.facts["answer"], int(example.answer_positions[0])
            text = text_of(tokenizer, example.input_ids[:start])
            assert tokenizer(text).input_ids == example.input_ids[:start].tolist()
            assert text.startswith(PAPER_WORDING.opening)
            assert text.count(key) == 2
            # A break, or the space that sets words off.
            assert text.endswith(f"{lead or ' '}{PAPER_WORDING.question}{ending}")
            answer = tokenizer.decode(example.input_ids[start:])
            assert answer == (key if ending == " " else f" {key}")
            assert example.answer_positions.tolist() == list(range(start, len(example.input_ids)))
            assert abs(len(example.input_ids) - LENGTH) <= 3

    def test_a_text_without_opening_starts_with_a_word(self, tokenizer, filler):
        wording = PAPER_WORDING._replace(opening="")
        for depth in (0.0, 0.5):
            example = passkey_text_example(tokenizer, filler, LENGTH, depth, np.random.default_rng(0), wording)
            assert not text_of(tokenizer, example.input_ids)[0].isspace()


class TestNeedle:
    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize("seed", range(4))
    def test_activity_is_hidden_at_its_depth_and_asked_for(self, tokenizer, filler, depth, seed):
        example = needle_example(tokenizer, filler, LENGTH, depth, np.random.default_rng(seed))
        ids, activity = example.input_ids, example.facts["answer"]
        assert example.facts == {"depth": depth, "answer": activity}
        deed, kind, thing = activity.split()
        assert deed in DEEDS
        assert kind in KINDS
        assert thing in THINGS

        text = text_of(tokenizer, ids)
        (city,) = re.findall(r" What is the best thing to do in ([\w ]+)\?", text)
        assert city in CITIES
        question = f"What is the best thing to do in {city}? The best thing to do in {city} is to"
        assert_asked_at_the_end(tokenizer, example, question)
        hidden = f" The best thing to do in {city} is to {activity}."
        assert text.count(hidden) == 1
        assert text.count(activity) == 2

        piece, end = encode(tokenizer, hidden), encode(tokenizer, f" {question}")
        start, end_start = find(ids, piece), find(ids, end)
        assert_at_depth(depth, start - len(opening_of(tokenizer)), end_start - start - len(piece))


NEEDLES = {
    "needles": (r"The best thing to do in {city} is to ([\w ]+)\.", "What is the best thing to do in {city}?"),
    "numbers": (r"The magic number of {city} is (\d{{5}})\.", "What is the magic number of {city}?"),
}


@pytest.mark.parametrize("task", NEEDLES)
class TestNeedlesOfOneForm:
    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize("seed", range(4))
    def test_one_of_several_is_asked_for(self, tokenizer, filler, task, depth, seed):
        draw = {"needles": needle_example, "numbers": number_example}[task]
        example = draw(tokenizer, filler, LENGTH, depth, np.random.default_rng(seed), NUM_DECOYS)
        needle, question = NEEDLES[task]
        text, answer = text_of(tokenizer, example.input_ids), example.facts["answer"]
        found = {city: re.findall(needle.format(city=city), text) for city in CITIES}
        of_cities = {city: answers for city, answers in found.items() if answers}
        assert len(of_cities) == NUM_DECOYS + 1
        assert all(len(answers) == 1 for answers in of_cities.values())
        assert len({answers[0] for answers in of_cities.values()}) == NUM_DECOYS + 1
        (city,) = [city for city in CITIES if question.format(city=city) in text]
        assert of_cities[city] == [answer]
        stem = re.sub(r" \(.*", "", needle.format(city=city))
        assert_asked_at_the_end(tokenizer, example, f"{question.format(city=city)} {stem}")

    def test_as_many_cities_as_there_are(self, tokenizer, filler, task):
        draw = {"needles": needle_example, "numbers": number_example}[task]
        draw(tokenizer, filler, 2 * LENGTH, 0.5, np.random.default_rng(0), len(CITIES) - 1)
        with pytest.raises(ValueError, match="num_decoys=10 must be less than the number of cities, 10"):
            draw(tokenizer, filler, 2 * LENGTH, 0.5, np.random.default_rng(0), len(CITIES))


def test_a_needle_alone_is_drawn_as_ever(tokenizer, filler):
    """The trials that were recorded before there were others beside it."""
    generator = np.random.default_rng(3)
    _, *words = (words[generator.integers(len(words))] for words in (CITIES, DEEDS, KINDS, THINGS))
    start = int(generator.integers(len(filler.ids)))
    example = needle_example(tokenizer, filler, LENGTH, 1.0, np.random.default_rng(3))
    assert example.facts["answer"] == " ".join(words)
    first = len(opening_of(tokenizer))
    assert torch.equal(example.input_ids[first : first + 50], filler.passage(start, 50))


class TestMqar:
    @pytest.mark.parametrize("num_pairs", [1, 2, 8, 30])
    @pytest.mark.parametrize("seed", range(3))
    def test_every_query_has_the_value_of_its_pair(self, tokenizer, filler, num_pairs, seed):
        example = mqar_example(tokenizer, filler, LENGTH, np.random.default_rng(seed), num_pairs)
        ids, first = example.input_ids.tolist(), len(opening_of(tokenizer))
        keys, values = ids[first : first + 2 * num_pairs : 2], ids[first + 1 : first + 2 * num_pairs : 2]
        middle, asked = ids[first + 2 * num_pairs : -2 * num_pairs], ids[-2 * num_pairs :]
        assert asked[::2] != keys or num_pairs <= 2
        assert sorted(asked[::2]) == sorted(keys)
        assert example.answer_positions.tolist() == list(range(LENGTH - 2 * num_pairs + 1, LENGTH, 2))
        value_of = dict(zip(keys, values))
        for position in example.answer_positions.tolist():
            assert ids[position] == value_of[ids[position - 1]]

        assert len({*keys, *values}) == 2 * num_pairs
        assert not {*keys, *values} & {*filler.ids.tolist(), *tokenizer.all_special_ids}
        assert set(middle) <= set(filler.ids.tolist())

    def test_refuses_filler_that_leaves_too_few_tokens(self, tokenizer):
        # BOS is the first token, and never one of a pair.
        enough = Filler("", torch.arange(1, len(tokenizer) - 16))
        pairs = mqar_example(tokenizer, enough, LENGTH, np.random.default_rng(0), num_pairs=8).input_ids[-16:]
        assert sorted(pairs.tolist()) == list(range(len(tokenizer) - 16, len(tokenizer)))
        too_many = Filler("", torch.arange(1, len(tokenizer) - 15))
        with pytest.raises(ValueError, match="8 pairs need 16 tokens that the filler has not; there are 15:"):
            mqar_example(tokenizer, too_many, LENGTH, np.random.default_rng(0), num_pairs=8)


class TestVariableTracking:
    @pytest.mark.parametrize(("num_hops", "num_chains"), [(0, 1), (1, 1), (4, 1), (2, 3), (4, 3)])
    @pytest.mark.parametrize("seed", range(3))
    def test_chain_leads_to_the_value(self, tokenizer, filler, num_hops, num_chains, seed):
        example = variable_tracking_example(
            tokenizer, filler, 2 * LENGTH, np.random.default_rng(seed), num_hops, num_chains
        )
        text = text_of(tokenizer, example.input_ids)
        assignments = re.findall(r" VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", text)
        assert len(assignments) == text.count("VAR ") - num_chains * num_hops == num_chains * (num_hops + 1)
        # No variable is read before it is assigned, and none is assigned twice.
        value_of = {}
        for name, source in assignments:
            assert name not in value_of
            value_of[name] = source if source.isdigit() else value_of[source]
        assert len(set(value_of.values())) == num_chains

        ((value, count, again),) = re.findall(
            r"assigned the value (\d+) in the text above\. .* (\d+) variables are assigned the value (\d+), they are:",
            text,
        )
        assert value == again
        names = [name for name in value_of if value_of[name] == value]
        assert len(names) == int(count) == num_hops + 1
        assert example.facts == {"answer": " ".join(names)}
        assert_asked_at_the_end(tokenizer, example, f"assigned the value {value}, they are:")

    def test_assignments_stand_apart_and_anywhere(self, tokenizer, filler):
        starts = []
        for seed in range(20):
            ids = variable_tracking_example(tokenizer, filler, 2 * LENGTH, np.random.default_rng(seed)).input_ids
            text = text_of(tokenizer, ids)
            starts += [match.start() / text.index(" Question:") for match in re.finditer(r" VAR \w+ =", text)]
        counts, _ = np.histogram(starts, bins=4, range=(0, 1))
        assert counts.sum() == 100
        assert counts.min() >= 12
