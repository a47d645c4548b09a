"""Work on a given text: repeat it, change a word in it, spell or reverse a word."""

from __future__ import annotations

import random

from ..exchange import Exchange, ask
from ..words import COMMON, NAMES, SMALL, SPELLING, pseudo_word, sentence

REPEAT_INLINE = (
    "Repeat after me: {}",
    "Repeat: {}",
    "Say this: {}",
    "Say: {}",
    "Please repeat this: {}",
    "Please repeat after me: {}",
    "Repeat this text word for word: {}",
    "Repeat the following text: {}",
    "Repeat exactly: {}",
    "Echo: {}",
    "Copy this text: {}",
    'Repeat this: "{}"',
    'Say "{}"',
)
REPEAT_BLOCK = (
    "Repeat this text word for word:\n{}",
    "Repeat the following text exactly:\n\n{}",
    "Please repeat the text below.\n\n{}",
    "Copy the text:\n{}",
    "Repeat after me:\n\n{}",
)
REPLACE = (
    'Replace "{old}" with "{new}": {text}',
    'Replace "{old}" with "{new}" in this text: {text}',
    'Change the word "{old}" to "{new}" in this text:\n{text}',
    'In the following text, change "{old}" to "{new}".\n\n{text}',
    "Replace the word {old} with {new}: {text}",
    "Change {old} to {new}: {text}",
)
SPELL = (
    'Spell the word "{}".',
    "Spell {}.",
    "Spell: {}",
    'How do you spell "{}"?',
    "How do you spell {}?",
    "Please spell the word {}.",
    'Spell "{}" letter by letter.',
    'What are the letters of "{}"?',
)
REVERSE = (
    'Reverse the word "{}".',
    "Reverse {}.",
    "Reverse: {}",
    'Write "{}" backwards.',
    "Write the word {} backwards.",
    'Spell "{}" backwards.',
    "What is {} backwards?",
)
_ASCII_MARKS = list("!?#$%&*+/=<>@[]{}^_|~;:")
_EXTRAS = list("éüñßçöà“”—…€✓→😀🎉你好世界日本йд")


def _word(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.30:
        return rng.choice(COMMON)
    if roll < 0.50:
        return rng.choice(SMALL)
    if roll < 0.58:
        return rng.choice(NAMES)
    if roll < 0.66:
        return str(rng.randint(0, 10 ** rng.randint(1, 5)))
    word = pseudo_word(rng)
    return word.capitalize() if roll < 0.72 else word


def _salad(rng: random.Random, words: int) -> str:
    """Random words with some punctuation; nothing to predict, so copying is all that helps."""
    out = []
    for _ in range(words):
        word = _word(rng)
        roll = rng.random()
        if roll < 0.08:
            word += rng.choice((",", ".", ":", ";", "!", "?"))
        elif roll < 0.09:
            word = rng.choice(("({})", '"{}"', "*{}*", "`{}`", "{}'s", "{}-")).format(word)
        elif roll < 0.10:
            word += " " + rng.choice(_EXTRAS if rng.random() < 0.5 else _ASCII_MARKS)
        out.append(word)
    text = " ".join(out)
    return text.capitalize() if rng.random() < 0.4 else text


def _typed(rng: random.Random, words: int) -> str:
    """As people type: no capital, no full stop, plain words."""
    if rng.random() < 0.5:
        return " ".join(rng.choice(rng.choice((COMMON, SMALL))) for _ in range(min(words, 12)))
    return sentence(rng).lower().rstrip(".!?")


def passage(rng: random.Random, words: int) -> str:
    """A text of about so many words: sentences, word salad, or a line as people type it."""
    roll = rng.random()
    if roll < 0.3:
        return _salad(rng, words)
    if roll < 0.5 and words < 40:
        return _typed(rng, words)
    parts: list[str] = []
    while sum(len(part.split()) for part in parts) < words:
        parts.append(sentence(rng))
    if rng.random() < 0.2:
        return "\n".join(parts)
    return " ".join(parts)


def _length(rng: random.Random) -> int:
    roll = rng.random()
    if roll < 0.35:
        return rng.randint(1, 8)
    if roll < 0.75:
        return rng.randint(5, 40)
    return rng.randint(30, 150)


def repeat(rng: random.Random) -> Exchange:
    """Repeat a text of 1 to 150 words verbatim."""
    text = passage(rng, _length(rng))
    if len(text.split()) > 150:
        text = " ".join(text.split()[:150])
    block = "\n" in text or rng.random() < 0.25
    template = rng.choice(REPEAT_BLOCK if block else REPEAT_INLINE)
    return ask(
        "repeat", template.format(text), text, "I have to repeat the text as it is.", key=text
    )


def replace_word(rng: random.Random) -> Exchange:
    """Give a text back with one word changed."""
    return _replace(
        rng, "replace", " ".join(sentence(rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))
    )


def replace_in_phrase(rng: random.Random) -> Exchange:
    """The same in a few words, where what is hard about it is most of the answer."""
    words = sentence(rng).lower().rstrip(".!?").split()
    first = rng.randrange(len(words))
    return _replace(rng, "phrase", " ".join(words[first : first + rng.randint(2, 5)]))


def _replace(rng: random.Random, skill: str, text: str) -> Exchange:
    words = sorted({w for w in text.replace("\n", " ").split(" ") if w.isalpha() and w.islower()})
    old = rng.choice([w for w in words if len(w) > 2] or words or ["the"])
    new = rng.choice(COMMON) if rng.random() < 0.8 else pseudo_word(rng)
    answer = " ".join(new if w == old else _with_mark(w, old, new) for w in text.split(" "))
    question = rng.choice(REPLACE).format(old=old, new=new, text=text)
    return ask(skill, question, answer, f'I have to write "{new}" where "{old}" stands.')


def _with_mark(word: str, old: str, new: str) -> str:
    return new + word[-1] if word[:-1] == old and not word[-1].isalpha() else word


def _short_word(rng: random.Random) -> str:
    if rng.random() < 0.75:
        return rng.choice(SPELLING)
    while True:
        word = pseudo_word(rng)
        if 3 <= len(word) <= 6:
            return word


def spell(rng: random.Random) -> Exchange:
    """Spell a word of 3 to 6 letters: "c-a-t"."""
    word = _short_word(rng)
    return ask(
        "spell", rng.choice(SPELL).format(word), "-".join(word), "I have to name its letters."
    )


def reverse(rng: random.Random) -> Exchange:
    """Write a word of 3 to 6 letters backwards, letter by letter."""
    word = _short_word(rng)
    answer = f"{'-'.join(word)} backwards is {'-'.join(reversed(word))}."
    question = rng.choice(REVERSE).format(word)
    return ask(
        "reverse", question, answer, "I spell the word, then I go from its end to its start."
    )
