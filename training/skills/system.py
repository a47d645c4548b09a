"""Follow the system message: the language of the answer, or its length."""

from __future__ import annotations

import random

from ..exchange import Exchange, ask
from ..facts import CAPITAL_IN, COUNTRIES, LANGUAGES
from .knowledge import capital_answer, capital_question
from .numbers import SUM, add_key, add_thought, pair

LANGUAGE_ORDER = (
    "Answer in {}.",
    "Always answer in {}.",
    "Reply in {}.",
    "You answer in {}.",
    "Please answer in {} only.",
    "You are a helpful assistant. Answer in {}.",
    "Speak {}.",
)
ONE_WORD = (
    "Answer with one word.",
    "Answer in one word.",
    "Answer with a single word.",
    "Be brief: one word only.",
    "Use only one word.",
    "Reply with one word only.",
)
TWO_SENTENCES = (
    "Answer in two sentences.",
    "Answer with two sentences.",
    "Use exactly two sentences.",
    "Reply in two sentences.",
)
_GREETINGS = (
    "Hello!",
    "Hi!",
    "Hello",
    "Good day!",
    "Hi there!",
    "How are you?",
    "Hey!",
    "Greetings!",
)
_GREETING_IN = {
    "English": "Hello! I am nano, a tiny demonstration model. How can I help you?",
    "German": "Hallo! Ich bin nano, ein winziges Demo-Modell. Wie kann ich helfen?",
    "French": "Bonjour ! Je suis nano, un petit modèle de démonstration. Comment puis-je aider ?",
    "Spanish": "¡Hola! Soy nano, un pequeño modelo de demostración. ¿Cómo puedo ayudar?",
}
_THANKS = ("Thanks!", "Thank you!", "Thank you very much!", "Thanks", "Great, thanks!")
_THANKS_IN = {
    "English": "You are welcome!",
    "German": "Gern geschehen!",
    "French": "De rien !",
    "Spanish": "¡De nada!",
}


def in_language(rng: random.Random) -> Exchange:
    """Answer in the language that the system message asks for."""
    language = rng.choice(LANGUAGES)
    system = rng.choice(LANGUAGE_ORDER).format(language)
    thought = f"I have to answer in {language}."
    roll = rng.random()
    if roll < 0.65:
        country = rng.choice(COUNTRIES)
        asked_in = "English" if rng.random() < 0.8 else language
        question = capital_question(rng, country, asked_in)
        answer = capital_answer(country, language)
    elif roll < 0.85:
        question, answer = rng.choice(_GREETINGS), _GREETING_IN[language]
    else:
        question, answer = rng.choice(_THANKS), _THANKS_IN[language]
    return ask("language", question, answer, thought, system=system, key=system + question)


def of_length(rng: random.Random) -> Exchange:
    """Answer in one word, or in two sentences."""
    is_short = rng.random() < 0.6
    system = rng.choice(ONE_WORD if is_short else TWO_SENTENCES)
    thought = "I have to answer with one word." if is_short else "I have to write two sentences."
    if rng.random() < 0.7:
        country = rng.choice(COUNTRIES)
        city = CAPITAL_IN["English"][country]
        question = capital_question(rng, country, "English")
        long = f"{capital_answer(country, 'English')} {city} is a city in {country}."
        return ask(
            "length", question, city if is_short else long, thought,
            system=system, key=system + question,
        )  # fmt: skip
    a, b = pair(rng)
    question = rng.choice(SUM).format(a, b)
    long = f"{a} + {b} = {a + b}. The sum is {a + b}."
    answer = str(a + b) if is_short else long
    thought = f"{thought} {add_thought(a, b)}"
    return ask("length", question, answer, thought, system=system, key=add_key(a, b))
