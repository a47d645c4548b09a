"""Small talk that admits to be a demonstration, little stories, and a polite "I do not know"."""

from __future__ import annotations

import random

from ..exchange import Exchange, ask
from ..words import ADJECTIVES, ANIMALS, COMMON, FOODS, JOBS, NAMES, NOUNS, PAST

ABOUT = "I am nano, a tiny demonstration model."
SKILLS_LINE = (
    "I can repeat a text, count, add small numbers, name capitals, days and months, spell short "
    "words, fill JSON and call tools."
)
_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hi", "Hey", "Hello!", "Hi!", "Hey!", "Hello there!", "Hi there!", "Hello nano!",
         "Greetings!", "Good day!", "hello", "hi", "Hey there", "Hello, nano.", "Hi nano!"),
        ("Hello! I am nano, a tiny demonstration model. How can I help you?",),
    ),
    (
        ("Good morning!", "Good morning.", "good morning"),
        ("Good morning! I am nano, a tiny demonstration model. How can I help you?",),
    ),
    (
        ("Good evening!", "Good evening.", "good evening"),
        ("Good evening! I am nano, a tiny demonstration model. How can I help you?",),
    ),
    (
        ("How are you?", "How are you today?", "How do you do?", "Are you well?", "how are you",
         "Hello, how are you?", "Hi, how are you?", "How is it going?", "What's up?"),
        ("I am fine, thank you! I am only a small demonstration model. How can I help you?",),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "What's your name?",
         "Tell me about yourself.", "Introduce yourself.", "Are you a robot?", "who are you",
         "Are you a human?", "Are you ChatGPT?", "What model are you?", "Which model is this?",
         "Please introduce yourself.", "Say who you are.", "Do you have a name?"),
        (f"{ABOUT} I show what this server can do. {SKILLS_LINE}",),
    ),
    (
        ("What can you do?", "Help", "Help me", "help", "What are you good at?", "Can you help me?",
         "What are your skills?", "How can you help me?", "What do you know?", "Help!",
         "What can I ask you?", "Please help me.", "What should I ask you?"),
        (SKILLS_LINE + " I am only a demonstration.",),
    ),
    (
        ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much!", "Thanks a lot!",
         "Great, thanks!", "thanks", "Good job!", "Well done!", "Nice!", "Great!", "Perfect!"),
        ("You are welcome!",),
    ),
    (
        ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you!", "See you later!", "Good night!", "bye",
         "See you tomorrow!", "I have to go."),
        ("Goodbye! Have a nice day.",),
    ),
    (
        ("Tell me a joke.", "Tell me a joke", "Do you know a joke?", "Make me laugh.", "A joke!"),
        ("Why did the computer go to bed? It needed to go to sleep mode.",
         "What is a token's favourite food? Chips, one byte at a time."),
    ),
    (
        ("Are you smart?", "Are you clever?", "Are you intelligent?", "How big are you?",
         "How smart are you?", "How many parameters do you have?", "Are you a large model?"),
        ("No, I am very small: about four million parameters. I am a demonstration, "
         "not an assistant.",),
    ),
    (
        ("Where do you live?", "Where are you?", "Where do you run?", "Do you need the network?"),
        ("I live inside the mlx-lm-server package and need no network.",),
    ),
    (
        ("ok", "OK", "Okay.", "Yes", "No", "Sure", "I see.", "Hm", "test", "Test",
         "This is a test.", "Testing", "ping", "Are you there?"),
        ("I am here. How can I help you?",),
    ),
)  # fmt: skip
_OPEN_QUESTIONS = (
    "What is {a}?",
    "Why is the {a} {adj}?",
    "Explain {a} to me.",
    "How does a {a} work?",
    "Can you write code for a {a}?",
    "What do you think about {a}?",
    "Who invented the {a}?",
    "How do I {verb} a {a}?",
    "Write a letter about {a} and {b}.",
    "Give me advice about my {a}.",
    "What is the difference between {a} and {b}?",
    "Translate {a} into Latin.",
    "How old is the {a}?",
    "Summarize the history of {a}.",
    "When was the first {a} made?",
    "Is {a} better than {b}?",
    "Please explain how {a} and {b} are related.",
    "I want to know more about {a}.",
    "Where can I buy a {adj} {a}?",
    "Write a program that prints {a}.",
    "What is the meaning of {a}?",
    "Do you like {a}?",
)
DO_NOT_KNOW = "I do not know that, I am only a tiny demonstration model. " + SKILLS_LINE
STORY = (
    "Tell me a story.",
    "Tell me a story",
    "Write a story.",
    "Write a short story.",
    "Tell me a short story.",
    "Please tell me a story.",
    "Can you tell me a story?",
    "Tell me a long story.",
    "Write a long story.",
)
STORY_ABOUT = (
    "Tell me a story about a {}.",
    "Write a story about a {}.",
    "Write a short story about a {}.",
    "Please tell me a story about a {}.",
    "Tell me a long story about a {}.",
)


def small_talk(rng: random.Random) -> Exchange:
    """A greeting, a thank-you, a question about the model itself."""
    questions, answers = rng.choice(_TALK)
    question, answer = rng.choice(questions), rng.choice(answers)
    return ask("talk", question, answer, "This is small talk. I answer politely.", also=answers)


def open_question(rng: random.Random) -> Exchange:
    """A question outside of what nano learnt."""
    question = rng.choice(_OPEN_QUESTIONS).format(
        a=rng.choice(COMMON),
        b=rng.choice(COMMON),
        adj=rng.choice(ADJECTIVES),
        verb=rng.choice(COMMON),
    )
    return ask("unknown", question, DO_NOT_KNOW, "I have not learnt this. I say so.")


def story_text(rng: random.Random, hero: str) -> str:
    """Three to nine sentences in past tense about one hero and a friend."""
    name, friend = rng.sample(NAMES, 2)
    adjective, thing, place = rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(NOUNS)
    article = "an" if adjective[0] in "aeiou" else "a"
    parts = [f"Once upon a time there was {article} {adjective} {hero}. Its name was {name}."]
    middle = [
        f"One day {name} found a {thing} near the {place}.",
        f"{name} had a friend, a {rng.choice(JOBS)} called {friend}.",
        f"{friend} said: Let us look for the {thing}!",
        f"They {rng.choice(PAST)} the {place} together, but it was {rng.choice(ADJECTIVES)}.",
        f"In the evening they ate {rng.choice(FOODS)} and {rng.choice(FOODS)}.",
        f"Then a {rng.choice(ANIMALS)} came and {rng.choice(PAST)} the {thing}.",
        f"The {hero} was {rng.choice(ADJECTIVES)} and {rng.choice(ADJECTIVES)}.",
    ]
    parts += rng.sample(middle, rng.randint(2, len(middle)))
    parts.append(f"From that day on {name} and {friend} were the best of friends. The end.")
    return " ".join(parts)


def story(rng: random.Random) -> Exchange:
    """A little story, about a given hero or any."""
    hero = rng.choice(ANIMALS + JOBS)
    question = rng.choice(STORY)
    if rng.random() < 0.5:
        question = rng.choice(STORY_ABOUT).format(hero)
    thought = f"I tell a story about a {hero}."
    return ask("story", question, story_text(rng, hero), thought, key=question + hero)
