"""
Made-up facts, stated somewhere in plain texts: what a layer's slots are to keep.

Nobody asks for these facts: [`fit_slot_score`] only has to tell their tokens from those of the text around them. So
the wordings are many, and their words are often odd: what it learns is that something is stated. They are in English,
whatever the texts are.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


# A window has a fact in about so many tokens.
TOKENS_PER_FACT = 170
# Each so many-th window is of a text that says the same again and again.
DULL = 4
# How many facts are numbers, and how many have words that mean nothing.
NUMBER_SHARE, INVENTED_SHARE = 0.6, 0.3


def _choices(text: str) -> list[str]:
    return text.split("|")


_WORDS = {
    "attribute": "combination|extension|serial number|index|entry code|reference|identifier|licence|postcode|balance|"
    "frequency|reading|deposit|batch number|seat|flight number|invoice|customer number|keypad code|case number|box|"
    "unlocking sequence|plate|checksum|model number|amount|quota|voucher|tracking number|locker|pager|fax|size|tally",
    "object": "wallet|cabin|bicycle|server|suitcase|engine|cellar|drawer|lamp|piano|truck|tent|camera|printer|boat|"
    "desk|helmet|garage|warehouse|telescope|parcel|tractor|radio|elevator|barn|locomotive|freezer|submarine|crate",
    "colour": "red|blue|green|yellow|purple|grey|brown",
    "quality": "red|old|small|blue|rusty|broken|heavy|green|second|northern|spare|rented|upper|third|narrow|yellow",
    "person": "Martha|Dieter|Yusuf|Ingrid|Pedro|Olga|Samuel|Priya|Victor|Helena|Boris|Amina|Captain Ruiz|Mrs. Novak|"
    "the plumber|the janitor|my uncle|our neighbour|Professor Ito|the new clerk|aunt Selma|the pilot|Kofi|Mr. Dunn",
    "place": "Paris|Vienna|Cairo|Boston|Delhi|Madrid|Rome|Zurich|Dakar|Perth|the north of Chile|Warsaw|Manila|Texas|"
    "the old harbour|Bogota|Iceland|the lower valley|Sofia|Riga|the market of Fez|Osaka|Havana|the second floor",
    "deed": "sell|repair|hide|steal|build|clean|borrow|sketch|burn|wash|bury|lift|weigh|bake|chase|collect|rent|mend",
    "kind": "silver|crooked|frozen|enormous|Spanish|dusty|woollen|cracked|invisible|copper|spotted|square|salted|loud",
    "things": "spoons|bridges|violins|parrots|carpets|ladders|clocks|tomatoes|engines|mirrors|candles|chairs|robots|"
    "umbrellas|cactuses|buttons|waffles|tractors|helicopters|anchors|turtles|stamps|guitars|pumpkins|maps|goats",
    "food": "lentil soup|smoked eel|rice with plums|garlic ice cream|pickled radish|walnut bread|goat cheese|cold pie",
    "job": "dentist|beekeeper|welder|tailor|tax inspector|violin maker|diver|librarian|magician|bus driver|locksmith",
    "unit": "grams|metres|euros|litres|volts|degrees|points|tons|hertz|pages",
    "unlock": "unlock|arm|reset|switch on|start|activate",
    "enter": "press|key in|turn to|punch in|send|tap",
    "letter": "X|Y|Z|Q|K|W|X1|Y7|Z1|Q7|K1|W7",
}
_WORDS = {name: _choices(words) for name, words in _WORDS.items()}
# What a fact says is in angle brackets: a number, something to do, things, or words of some name.
_NUMBERS = _choices(
    "The {attribute} of the {quality} {object} is <number>.|{person}'s {attribute} is <number>.|"
    "The {object} {attribute} is <number>.|To {unlock} the {quality} {object}, {enter} <number>.|"
    "{attribute} = <number>|\n{attribute}: <number>\n|Let {letter} be <number>.|VAR {letter} = <number>.|"
    "<number> is what the {object} shows.|Keep <number> as the {attribute} for {person}.|"
    "\n{object} {attribute} = <number>\n|They gave the {object} the {attribute} <number>.|"
    "{person} chose <number> as the {attribute}.|You can reach {person} at <number>.|"
    "On the {quality} {object} stands <number>.|The {quality} {object} reads <number>.|"
    "I was told that the {attribute} had become <number>.|If one wants the {attribute} of {person}, it is <number>.|"
    "In {place}, the {attribute} starts with <number>.|{person} has set the {object} to <number>.|"
    "The {object} weighs <number> {unit}.|{person} goes by the {attribute} <number>.|"
    "The {attribute} for {place} was changed to <number>.|{enter} <number> and the {object} opens."
)
_OTHERS = _choices(
    "What {person} likes most in {place} is to <doing>.|{person} keeps <kinds> in the {object}.|"
    "In {place}, everybody wants to <doing>.|The favourite dish of {person} is <food>.|"
    "{person} works as a <job> in {place}.|The {quality} {object} stands in <place>.|"
    "The most useful thing about {place} is that you can <doing> there.|{person} hid the {object} in <place>.|"
    "People come to {place} in order to <doing>.|Nothing is more fun in {place} than to <doing>.|"
    "Every Sunday {person} has to <doing>.|The colour of the {object} in {place} is <colour>.|"
    "{place} is famous for its <kinds>.|If you ever visit {place}, do not forget to <doing>.|"
    "My advice for {place}: <doing>.|{person} has moved to <place>.|The owner of the {quality} {object} is <person>."
)
_BEFORE = _choices("|||| By the way.| Important:| A fact to retain:| Note:| Listen:| Attention, please.")
_AFTER = _choices("||||| Again: {}.| {} it is.| Note {} well.| So keep {} in mind.| {}, do you hear?")
_DULL = _choices(
    "The {object} is {quality}.|The river is long.|Off we run.|Up and down we climb.|It rains today.|Bread is warm.|"
    "Nobody is at home.|One step, then another step.|A bird sings.|Nothing else happens here.|Then we go again."
)


def _draw(choices: Sequence[str], generator: np.random.Generator) -> str:
    return choices[int(generator.integers(len(choices)))]


def _words(generator: np.random.Generator) -> dict[str, str]:
    """One word or phrase of each name."""
    words = {name: _draw(choices, generator) for name, choices in _WORDS.items()}
    words["number"] = "".join(map(str, generator.integers(10, size=int(generator.integers(3, 8)))))
    words["kinds"] = f"{words['kind']} {words['things']}"
    words["doing"] = f"{words['deed']} {words['kinds']}"
    return words


def _invented(generator: np.random.Generator) -> str:
    """A word that means nothing."""
    syllables = range(int(generator.integers(2, 4)))
    return "".join(_draw(letters, generator) for _ in syllables for letters in ("bcdfghjklmnprstvwz", "aeiou"))


def draw_fact(generator: np.random.Generator) -> str:
    """A statement, white space before it: a number or something else, said once or twice, with or without a call."""
    statement = _draw(_NUMBERS if generator.random() < NUMBER_SHARE else _OTHERS, generator)
    # What a fact says is drawn apart: {place} and <place> are two places.
    values = _words(generator)
    value = values[re.findall(r"<(\w+)>", statement)[0]]
    statement = statement.format(**_words(generator))
    if generator.random() < INVENTED_SHARE:
        # That something is announced counts, in whatever words.
        words = statement.split(" ")
        words = [_invented(generator) if word.isalpha() and generator.random() < 0.5 else word for word in words]
        statement = " ".join(words)
    if not statement[0].isspace():
        statement = f" {statement[0].upper()}{statement[1:]}"
    return _draw(_BEFORE, generator) + re.sub(r"<\w+>", value, statement) + _draw(_AFTER, generator).format(value)


def draw_dull_text(generator: np.random.Generator) -> str:
    """A few short sentences, which as a text are said again and again."""
    count = int(generator.integers(1, 6))
    return " ".join(_draw(_DULL, generator).format(**_words(generator)) for _ in range(count))


def fact_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Passages of texts, with facts between their words.

    Args:
        texts: none of them empty. Short ones are repeated.
        length: number of tokens in a window.
        count: number of windows.

    Returns:
        The ids `(count, length)`, and which tokens are of facts, `(count, length)` bool.

    Raises:
        ValueError: if the tokenizer does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"A {type(tokenizer).__name__} does not say where in a text its tokens stand, as a fit of slots needs it. "
            "Convert it to a fast tokenizer, or convert the model without slots."
        )
    generator = np.random.default_rng(seed)
    windows = []
    for number in range(count):
        is_dull = number % DULL == DULL - 1
        text = draw_dull_text(generator) if is_dull else _draw(texts, generator)
        windows.append(_window(tokenizer, text, length, generator))
    ids, is_fact = zip(*windows)
    return torch.stack(ids), torch.stack(is_fact)


def _window(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One passage, from anywhere in the text: ids and which are of facts, `(length,)` each."""
    # Tokens have rarely more than eight characters.
    characters, offsets = 4 * length, torch.empty(0, 2)
    while len(offsets) < length:
        characters *= 2
        repeated = f"{text} " * (characters // len(text) + 2)
        start = int(generator.integers(len(repeated) - characters))
        passage = repeated[start : start + characters]
        _, offsets = _tokens(tokenizer, passage)
    gaps = [found.start() for found in re.finditer(r"\s", passage[: int(offsets[length - 1, 1])])]
    num_facts = max(1, length // TOKENS_PER_FACT)
    if len(gaps) < num_facts:
        # A language that is written without spaces.
        gaps = offsets[:length, 0].unique().tolist()
    cuts = sorted(generator.choice(gaps, num_facts).tolist())
    pieces, spans, end = [], [], 0
    for before, cut in zip([0, *cuts], cuts):
        fact = draw_fact(generator)
        pieces += [passage[before:cut], fact]
        end += cut - before
        spans.append((end, end + len(fact)))
        end += len(fact)
    ids, offsets = _tokens(tokenizer, "".join([*pieces, passage[cuts[-1] :]]))
    is_fact = torch.zeros(len(offsets), dtype=torch.bool)
    for first, last in spans:
        is_fact |= (offsets[:, 1] > first) & (offsets[:, 0] < last)
    return ids[:length], is_fact[:length]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `(tokens,)`, and where each begins and ends in the text `(tokens, 2)`."""
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return torch.tensor(tokens["input_ids"]), torch.tensor(tokens["offset_mapping"])
