"""Capitals, days and months."""

from __future__ import annotations

import random

from ..exchange import Exchange, ask
from ..facts import (
    CAPITAL_IN,
    COUNTRIES,
    COUNTRY_IN,
    DAYS,
    LANGUAGES,
    MONTHS,
    ORDINALS,
    french_of,
)

CAPITAL_ENGLISH = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "What is {}'s capital?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}.",
    "Do you know the capital of {}?",
    "What is the capital city of {}?",
    "capital of {}",
    "The capital of {}?",
    "Please tell me the capital of {}.",
)
CAPITAL_ASKED_IN = {
    "German": ("Was ist die Hauptstadt von {}?", "Wie heißt die Hauptstadt von {}?"),
    "French": ("Quelle est la capitale {}?", "Quelle est la capitale {} ?"),
    "Spanish": ("¿Cuál es la capital de {}?", "¿Qué ciudad es la capital de {}?"),
}
CAPITAL_ANSWER = {
    "English": "The capital of {} is {}.",
    "German": "Die Hauptstadt von {} ist {}.",
    "French": "La capitale {} est {}.",
    "Spanish": "La capital de {} es {}.",
}
DAY_LIST = ("List the days of the week.", "What are the days of the week?", "Name the seven days.")
MONTH_LIST = ("List the months of the year.", "What are the months?", "Name the twelve months.")
AFTER = (
    "What {unit} comes after {name}?",
    "Which {unit} comes after {name}?",
    "Which {unit} follows {name}?",
    "What is the {unit} after {name}?",
    "What {unit} is after {name}?",
    "Tell me the {unit} after {name}.",
)
BEFORE = (
    "What {unit} comes before {name}?",
    "Which {unit} comes before {name}?",
    "What is the {unit} before {name}?",
    "What {unit} is before {name}?",
    "Tell me the {unit} before {name}.",
)
NTH = (
    "What is the {nth} {unit} of the {whole}?",
    "Which is the {nth} {unit} of the {whole}?",
    "Name the {nth} {unit} of the {whole}.",
    "Tell me the {nth} {unit} of the {whole}.",
)


def capital_answer(country: str, language: str) -> str:
    """One sentence in that language."""
    name = COUNTRY_IN[language][country]
    place = french_of(name) if language == "French" else name
    return CAPITAL_ANSWER[language].format(place, CAPITAL_IN[language][country])


def capital_question(rng: random.Random, country: str, language: str) -> str:
    """A question in that language."""
    if language == "English":
        return rng.choice(CAPITAL_ENGLISH).format(country)
    name = COUNTRY_IN[language][country]
    place = french_of(name) if language == "French" else name
    return rng.choice(CAPITAL_ASKED_IN[language]).format(place)


def capital(rng: random.Random) -> Exchange:
    """The capital of one of 40 countries, answered in the language of the question."""
    country = rng.choice(COUNTRIES)
    language = "English" if rng.random() < 0.85 else rng.choice(LANGUAGES[1:])
    question = capital_question(rng, country, language)
    thought = f"The country is {country}. Its capital is {CAPITAL_IN['English'][country]}."
    return ask("capital", question, capital_answer(country, language), thought)


def calendar(rng: random.Random) -> Exchange:
    """Days and months: the list, the next, the one before, the n-th."""
    unit, whole, names = rng.choice((("day", "week", DAYS), ("month", "year", MONTHS)))
    roll = rng.random()
    if roll < 0.08:
        question = rng.choice(DAY_LIST if unit == "day" else MONTH_LIST)
        answer = ", ".join(names) + "."
        return ask("calendar", question, answer, f"I list each {unit} in order.", key="list" + unit)
    i = rng.randrange(len(names))
    thought = f"I go through the {unit}s in order."
    if roll < 0.40:
        question = rng.choice(AFTER).format(unit=unit, name=names[i])
        answer = f"{names[(i + 1) % len(names)]} comes after {names[i]}."
    elif roll < 0.72:
        question = rng.choice(BEFORE).format(unit=unit, name=names[i])
        answer = f"{names[i - 1]} comes before {names[i]}."
    else:
        question = rng.choice(NTH).format(nth=ORDINALS[i], unit=unit, whole=whole)
        answer = f"The {ORDINALS[i]} {unit} of the {whole} is {names[i]}."
    return ask("calendar", question, answer, thought)
