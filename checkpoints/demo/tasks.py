"""What the demo model does: its prompt, and the right answer for the base and for every adapter.

Plain Python, so that tests and load generators can check each answer as it arrives:

    TASKS["shift-3"].answer("hello world")  ->  "khoor zruog"     (the adapter `shift-3`)
    BASE_TASK.answer("hello world")         ->  "hello world"     (no adapter)

A prompt is `prompt(text)`, that is `hello world =>`. The completion is the answer and nothing else
(no leading space), then <eos>. The model was trained on texts as `random_text` makes them: at most
MAX_TEXT_LENGTH characters of ALPHABET, single spaces between words, none at either end.
"""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Callable, Mapping

__all__ = [
    "ALPHABET",
    "BASE_TASK",
    "MAX_ANSWER_LENGTH",
    "MAX_TEXT_LENGTH",
    "TASKS",
    "Task",
    "prompt",
    "random_text",
]

MAX_TEXT_LENGTH = 24  # characters
MAX_ANSWER_LENGTH = 2 * MAX_TEXT_LENGTH  # characters; `double` and `stutter` reach it
PUNCTUATION = ".,!?"
ALPHABET = string.ascii_letters + string.digits + PUNCTUATION + " "


def prompt(text: str) -> str:
    """The prompt that asks the model for its answer to `text`."""
    return f"{text} =>"


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One thing that the model does with a text. `answer` is the exact completion, less <eos>."""

    id: str  # adapter id, or "base"
    description: str
    answer: Callable[[str], str]


def _translation(table: Mapping[str, str]) -> Callable[[str], str]:
    codes = str.maketrans(dict(table))
    return lambda text: text.translate(codes)


def _shift(places: int) -> Callable[[str], str]:
    return _translation(
        {
            letters[i]: letters[(i + places) % 26]
            for letters in (string.ascii_lowercase, string.ascii_uppercase)
            for i in range(26)
        }
    )


def _each_word(change: Callable[[str], str], joined_by: str = " ") -> Callable[[str], str]:
    return lambda text: joined_by.join(change(word) for word in text.split(" "))


def _capitalised(word: str) -> str:
    return word[:1].upper() + word[1:].lower()


_VOWELS = "aeiouAEIOU"
_ATBASH = {
    letters[i]: letters[25 - i]
    for letters in (string.ascii_lowercase, string.ascii_uppercase)
    for i in range(26)
}
_LEET = dict(zip("aeiostAEIOST", "431057431057", strict=True))

SHIFTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 17, 20, 25)

BASE_TASK = Task("base", "repeats the text", lambda text: text)

_TASKS = (
    *(Task(f"shift-{k}", f"moves every letter {k} on in the alphabet", _shift(k)) for k in SHIFTS),
    Task("atbash", "mirrors the alphabet: a to z, b to y", _translation(_ATBASH)),
    Task("upper", "upper-cases every letter", str.upper),
    Task("lower", "lower-cases every letter", str.lower),
    Task("swapcase", "swaps upper and lower case", str.swapcase),
    Task("title", "capitalises every word", _each_word(_capitalised)),
    Task("pascal", "capitalises every word and drops the spaces", _each_word(_capitalised, "")),
    Task("snake", "replaces spaces by underscores", _translation({" ": "_"})),
    Task("kebab", "replaces spaces by hyphens", _translation({" ": "-"})),
    Task("join", "drops the spaces", _translation({" ": ""})),
    Task("exclaim", "adds an exclamation mark to every word", _each_word(lambda word: word + "!")),
    Task("quote", "puts the text in double quotes", lambda text: f'"{text}"'),
    Task("brackets", "puts every word in square brackets", _each_word(lambda word: f"[{word}]")),
    Task("star-vowels", "replaces vowels by *", _translation(dict.fromkeys(_VOWELS, "*"))),
    Task("drop-vowels", "drops the vowels", _translation(dict.fromkeys(_VOWELS, ""))),
    Task("hash-digits", "replaces digits by #", _translation(dict.fromkeys(string.digits, "#"))),
    Task("mask", "replaces letters by x", _translation(dict.fromkeys(string.ascii_letters, "x"))),
    Task("leet", "writes a e i o s t as 4 3 1 0 5 7", _translation(_LEET)),
    Task("double", "writes every character twice", lambda text: "".join(c + c for c in text)),
    Task("spell", "puts a hyphen between all characters", "-".join),
    Task(
        "initials", "keeps the first character of every word", _each_word(lambda word: word[:1], "")
    ),
    Task("first-word", "keeps the first word", lambda text: text.split(" ")[0]),
    Task("last-word", "keeps the last word", lambda text: text.split(" ")[-1]),
    Task(
        "stutter", "repeats the first character of every word", _each_word(lambda w: f"{w[:1]}-{w}")
    ),
    Task("reverse", "reverses the text", lambda text: text[::-1]),
    Task("reverse-words", "reverses every word in its place", _each_word(lambda word: word[::-1])),
)

TASKS: Mapping[str, Task] = {task.id: task for task in _TASKS}


def random_text(rng: random.Random) -> str:
    """Random words, 1 to MAX_TEXT_LENGTH characters in all.

    Mostly lower case; some capitals, digits and punctuation.
    """
    limit = rng.randint(1, MAX_TEXT_LENGTH)
    text = _random_word(rng, limit)
    while limit - len(text) >= 2:
        text += " " + _random_word(rng, limit - len(text) - 1)
    return text


def _random_word(rng: random.Random, limit: int) -> str:
    style = rng.random()
    length = min(limit, rng.randint(1, 9))
    if style < 0.5:
        letters = string.ascii_lowercase
    elif style < 0.75:
        letters = string.ascii_letters
    elif style < 0.8:
        letters = string.ascii_uppercase
    elif style < 0.88:
        letters = string.digits
    elif style < 0.95:
        letters = string.ascii_letters + string.digits
    else:  # few letters, often repeated
        letters = "".join(rng.choices(string.ascii_lowercase, k=2))
    word = "".join(rng.choices(letters, k=length))
    if length > 1 and rng.random() < 0.1:
        return word[:-1] + rng.choice(PUNCTUATION)
    if length > 1 and rng.random() < 0.1:
        return word[:1].upper() + word[1:]
    return word
