"""How a passkey is announced and asked for: a few fixed wordings, and a grammar of very many."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Wording(NamedTuple):
    """
    What stands before the filler, how the number is hidden in it (`{key}`), and what stands after it. A space comes
    before the last two, unless they bring a line break.
    """

    opening: str
    needle: str
    question: str

    def answer(self, key: str) -> str:
        """What comes after the question: a space, unless the question ends in one, and the key."""
        return key if self.question.endswith(" ") else f" {key}"


_OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
# As in the appendix of arXiv 2404.07143.
PAPER_WORDING = Wording(
    _OPENING, "The pass key is {key}. Remember it. {key} is the pass key.", "What is the pass key? The pass key is"
)
TRAINING_WORDINGS = (
    PAPER_WORDING,
    Wording(
        "Somewhere below a secret code is given. You will be asked for it.",
        "The secret code is {key}. Do not forget it: {key}.",
        "Which secret code was given? The secret code is",
    ),
    Wording(
        "Read all of this, and keep the number of my room in mind.",
        "My room has the number {key}. Again, it is {key}.",
        "What number does my room have? My room has the number",
    ),
    Wording(
        "",
        "Please note that the ticket number is {key}. You will need {key} later.",
        "What is the ticket number? The ticket number is",
    ),
    Wording(
        "What follows is long, and one number in it matters.",
        "The number that matters is {key}. Yes, {key}.",
        "What is the number that matters? The number that matters is",
    ),
    Wording(
        "", "Write this down: to open the safe, dial {key}. I repeat, dial {key}.", "How is the safe opened? Dial"
    ),
)
# Not seen in training by the recipe of `examples/train_passkey.py`: neither the sentences nor what they are about.
HELD_OUT_WORDINGS = (
    Wording(_OPENING, "The magic number is {key}. Keep {key} in memory.", "What is the magic number? It is"),
    Wording("", "Our account ends in {key}. That is {key}.", "What does our account end in? Our account ends in"),
    Wording("", "The password is {key}, so enter {key}.", "Which password is to be entered? Enter"),
    Wording(
        "", "Her badge says {key}, and nothing but {key}.", "\nCan you recall what her badge says? Her badge says"
    ),
    Wording(
        "Later on I want to hear a registration from you.",
        "By the way, the car is registered under {key}. It was {key} before, too.",
        "Under what is the car registered? The car is registered under",
    ),
    Wording(
        "",
        "Nobody except you may learn that they fixed the alarm at {key}.",
        "\n\nQuestion: At what did they fix the alarm?\nReply:",
    ),
    Wording("", "\nPassword = {key}\n", "\nRepeat the line with the password.\nPassword ="),
    Wording(
        "The verification digits come soon.",
        "Type the verification digits {key} when the screen asks for them.",
        "Which verification digits does the screen ask for? Type",
    ),
)

# The grammar's slots. A name is a kind with or without a quality, an owner or a purpose: `secret code for the gate`.
_KINDS = (
    "pass key",
    "secret code",
    "secret number",
    "access code",
    "PIN",
    "code",
    "number",
    "key",
    "passcode",
    "ticket number",
    "room number",
    "phone number",
    "lucky number",
    "door code",
    "order number",
    "serial number",
    "security code",
    "house number",
    "reference number",
    "telephone number",
    "winning number",
    "ID",
    "safe combination",
    "number that matters",
    "answer",
)
_QUALITIES = (
    "secret",
    "hidden",
    "special",
    "new",
    "old",
    "right",
    "private",
    "important",
    "first",
    "last",
    "only",
    "true",
    "full",
    "great",
    "present",
    "final",
)
_PURPOSES = (
    "of the safe",
    "for the gate",
    "of the ship",
    "for the house",
    "of my brother",
    "for today",
    "of the lady",
    "of this story",
    "to the garden",
    "for the office",
    "that you need",
    "of the king",
)
_VERBS = ("is", "is", "is", "is", "is", "was", "will be", "shall be", "must be", "equals", "reads", "remains")
_ANNOUNCEMENTS = (
    "The {name} {verb} {key}.",
    "The {name} {verb} {key}.",
    "The {name} {verb} {key}.",
    "The {name} {verb} {key}.",
    "Remember: the {name} {verb} {key}.",
    "Remember that the {name} {verb} {key}.",
    "Please note that the {name} {verb} {key}.",
    "Write this down: the {name} {verb} {key}.",
    "It is important that the {name} {verb} {key}.",
    "My {name} {verb} {key}.",
    "Your {name} {verb} {key}.",
    "His {name} {verb} {key}.",
    "I tell you that {key} {verb} the {name}.",
    "{key} {verb} the {name}.",
    "Here is the {name}: {key}.",
    "The {name}: {key}.",
    "{name}: {key}",
    "Take {key} for the {name}.",
    "Use {key} as the {name}.",
    "We have set the {name} to {key}.",
    "Do not forget the {name} {key}.",
    "You will be asked for the {name}, which {verb} {key}.",
    "As for the {name}, it {verb} {key}.",
)
_REMINDERS = (
    "",
    "",
    "",
    " Remember it.",
    " Remember it. {key} {verb} the {name}.",
    " Do not forget it: {key}.",
    " Again, it {verb} {key}.",
    " I repeat, {key}.",
    " You will need {key} later.",
    " Yes, {key}.",
    " Once more: the {name} {verb} {key}.",
    " So it {verb} {key}, and I shall ask for it.",
    " This matters.",
)
_QUESTIONS = (
    "What {verb} the {name}?",
    "What {verb} the {name}?",
    "What {verb} the {name}?",
    "What {verb} the {name} that I told you?",
    "What {verb} the {name} in the text above?",
    "Which {name} was given?",
    "Do you remember the {name}?",
    "Tell me the {name}.",
    "Please give me the {name}.",
    "Now say the {name}.",
    "I ask you for the {name}.",
    "Question: what {verb} the {name}?",
    "Q: What {verb} the {name}?",
    "",
)
_ANSWERS = (
    "The {name} {verb}",
    "The {name} {verb}",
    "The {name} {verb}",
    "The {name} {verb}",
    "The {name} is",
    "The {name} was",
    "It {verb}",
    "It is",
    "Answer:",
    "A:",
    "The answer is",
    "The {name}:",
    "{name}:",
    "My {name} {verb}",
    "Yes, the {name} {verb}",
    "",
)
_THINGS = ("room", "house", "ship", "horse", "seat", "letter", "prisoner", "soldier", "street", "page")
_HAVING = (
    ("{owner} {name} has the number {key}.", "What number does {owner} {name} have?", "{owner} {name} has the number"),
    (
        "{owner} {name} carries number {key}.",
        "Which number does {owner} {name} carry?",
        "{owner} {name} carries number",
    ),
    (
        "The number of {owner} {name} is {key}.",
        "What is the number of {owner} {name}?",
        "The number of {owner} {name} is",
    ),
    ("You find {owner} {name} under {key}.", "Where do you find {owner} {name}?", "You find {owner} {name} under"),
)
_OWNERS = ("my", "your", "the", "our", "his", "this")
_DEEDS = (
    ("open the safe", "How is the safe opened?"),
    ("open the door", "How do you open the door?"),
    ("call the doctor", "How do I call the doctor?"),
    ("start the engine", "How is the engine started?"),
    ("reach my sister", "How is my sister reached?"),
    ("enter the house", "How does one enter the house?"),
    ("stop the clock", "What stops the clock?"),
)
_COMMANDS = ("dial", "press", "choose", "use", "say", "give", "write")
_OPENINGS = (
    "",
    "",
    "",
    _OPENING,
    "Read all of this, and keep the {name} in mind.",
    "Somewhere below the {name} is given. You will be asked for it.",
    "What follows is long, and one number in it matters.",
    "Find the {name} in this text.",
    "Here is a long text.",
)
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def _invented(generator: np.random.Generator) -> str:
    """A word that means nothing."""
    syllables = range(int(generator.integers(2, 4)))
    return "".join(str(generator.choice([*letters])) for _ in syllables for letters in (_CONSONANTS, _VOWELS))


def draw_wording(generator: np.random.Generator) -> Wording:
    """
    Any of the grammar's wordings: what the number is called, how it is announced and asked for, how often it is said,
    and whether there are line breaks, an opening, a question, a beginning of the answer and white space after it. In
    half of them, half of the words mean nothing.
    """

    def one_of(choices: Sequence):
        return choices[int(generator.integers(len(choices)))]

    def chance(probability: float) -> bool:
        return bool(generator.random() < probability)

    def blurred(text: str) -> str:
        words = text.split(" ")
        return " ".join(_invented(generator) if word.isalpha() and chance(0.5) else word for word in words)

    verb = one_of(_VERBS)
    name = one_of(_KINDS)
    if chance(0.5):
        name = f"{_invented(generator) if chance(0.4) else one_of(_QUALITIES)} {name}"
    if chance(0.2):
        name = f"{name} {one_of(_PURPOSES)}"
    needle, question, beginning = one_of(_ANNOUNCEMENTS) + one_of(_REMINDERS), one_of(_QUESTIONS), one_of(_ANSWERS)
    owner = command = ""
    other = generator.random()
    if other < 0.1:
        name = _invented(generator) if chance(0.3) else one_of(_THINGS)
        owner, verb = one_of(_OWNERS), "is"
        needle, question, beginning = one_of(_HAVING)
        needle += one_of((*_REMINDERS[:4], *_REMINDERS[5:10]))
    elif other < 0.2:
        deed, question = one_of(_DEEDS)
        command, name, verb = one_of(_COMMANDS), "number", "is"
        needle = f"{one_of(('', 'Write this down: ', 'Remember: '))}To {deed}, {command} {{key}}."
        needle += one_of((*_REMINDERS[:4], *_REMINDERS[5:10], " I repeat, {command} {{key}}."))
        beginning = "{command}"

    def filled(text: str) -> str:
        text = text.format(name=name, verb=verb, owner=owner, command=command, key="{key}")
        return text[:1].upper() + text[1:]

    if not question and "{name}" not in beginning:
        question = "What {verb} the {name}?"
    if chance(0.5):
        # What counts is that a number is announced, in whatever words.
        needle, question, beginning = map(blurred, (needle, question, beginning))
    asked = one_of((" ", " ", "\n")).join(filter(None, (filled(question), filled(beginning))))
    lead, tail = (
        one_of(("", "", "", "", "\n", "\n\n")),
        one_of(("", "", "", "", " ", "\n" if asked[-1] in "?:." else " ")),
    )
    lines = ("\n", "\n") if chance(0.15) else ("", "")
    return Wording(filled(one_of(_OPENINGS)), filled(needle).join(lines), f"{lead}{asked}{tail}")


def borrow_wording(words: Sequence[str], generator: np.random.Generator) -> Wording:
    """
    A number that stands in the middle of some text, and is asked for by other text: any words can announce it.

    Args:
        words: of a text, in order; runs of them are taken.
    """

    def run(least: int, most: int) -> str:
        start = int(generator.integers(len(words)))
        taken = words[start : start + int(generator.integers(least, most + 1))]
        return " ".join(word for word in taken if not any(character in "0123456789{}" for character in word))

    marks = (".", ".", ",", ",", "", "", ";", "!")
    needle = f"{run(1, 10)} {{key}}{generator.choice(marks)} {run(0, 10)}"
    if generator.random() < 0.5:
        needle = f"{needle} {{key}}{generator.choice(marks)}"
    lead, tail = generator.choice(["", "", "\n"]), generator.choice(["", "", "", " ", "\n"])
    asked = f"{run(1, 8)}{generator.choice(['?', '.', ''])} {run(1, 5)}{generator.choice(['', '', ':'])}"
    return Wording("", needle.strip(), f"{lead}{asked.strip()}{tail}")


def draw_plain_wording(generator: np.random.Generator) -> Wording:
    """The paper's, with or without its opening, a line break before the question, and white space after it."""
    lead, tail = generator.choice(["", "\n"]), generator.choice(["", "", " ", "\n"])
    opening = PAPER_WORDING.opening if generator.random() < 0.5 else ""
    return PAPER_WORDING._replace(opening=opening, question=f"{lead}{PAPER_WORDING.question}{tail}")
