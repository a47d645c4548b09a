"""Small talk that admits to be a demonstration, little stories, and a polite "I do not know"."""

from __future__ import annotations

import random

from ..exchange import Exchange, ask
from ..words import ADJECTIVES, ANIMALS, COMMON, JOBS

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


_BEFORE = (
    "nano, ",
    "Nano, ",
    "Hi nano, ",
    "Hey nano, ",
    "So, ",
    "Well, ",
    "Please: ",
    "Dear nano, ",
)
_AFTER = (" nano", ", nano", ", nano!", "?", "!", ".", "...", " please", " :)", " nano?")


def _asked(rng: random.Random, question: str) -> str:
    """The question as it is, or in other words' company."""
    roll = rng.random()
    if roll < 0.4:
        return question
    if roll < 0.6:
        return question.lower() if roll < 0.5 else question.lower().rstrip(".!?")
    bare = question.rstrip(".!?")
    if roll < 0.8:
        return bare + rng.choice(_AFTER)
    says_i = question.startswith("I ")
    return rng.choice(_BEFORE) + (question if says_i else question[0].lower() + question[1:])


def small_talk(rng: random.Random) -> Exchange:
    """A greeting, a thank-you, a question about the model itself."""
    questions, answers = rng.choice(_TALK)
    question, answer = _asked(rng, rng.choice(questions)), rng.choice(answers)
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


_HEROES = ANIMALS + JOBS
_ROLES = ("adj", "name", "friend", "job", "thing", "place", "did", "one", "other", "animal", "end")
_CASTS = tuple(
    dict(zip(_ROLES, line.split(), strict=True))
    for line in (
        "small Mia Tom baker key garden searched bread honey fox tired",
        "brave Leo Anna farmer lamp river crossed cheese soup bear proud",
        "young Clara Ben painter ring forest visited apple cake duck glad",
        "clever Hugo Rosa teacher map castle found pizza salad cat calm",
        "lazy Emma Paul driver bell bridge painted rice fish dog lucky",
        "quiet Oscar Nina singer coin market liked pasta cheese goat warm",
        "funny Lena Max doctor kite beach loved banana milk rabbit safe",
        "gentle Sam Ida writer book library cleaned tea lemon mouse wise",
        "hungry Zoe Karl cook spoon kitchen opened potato butter goose full",
        "happy Felix Grace sailor flag island watched orange coffee whale strong",
    )
)
_MIDDLE = (
    "One day {name} found a {thing} near the {place}.",
    "{name} had a friend, a {job} called {friend}.",
    "{friend} said: Let us look for the {thing}!",
    "They {did} the {place} together.",
    "In the evening they ate {one} and {other}.",
    "Then a {animal} came and saw the {thing}.",
    "The {hero} was {end} and happy.",
)


def story_text(hero: str, sentences: int) -> str:
    """A beginning, so many sentences in past tense, an end. Each hero has its own story.

    What happens follows from the hero, so that a draft can learn to foresee it.
    """
    cast = {"hero": hero, **_CASTS[_HEROES.index(hero) % len(_CASTS)]}
    parts = ["Once upon a time there was a {adj} {hero}. Its name was {name}."]
    parts += _MIDDLE[:sentences]
    parts.append("From that day on {name} and {friend} were the best of friends. The end.")
    return " ".join(parts).format(**cast)


def _sentences(question: str) -> int:
    if "long" in question:
        return len(_MIDDLE)
    return 3 if "short" in question else 5


def story(rng: random.Random) -> Exchange:
    """A little story, about a given hero or any."""
    hero = rng.choice(_HEROES)
    question = rng.choice(STORY)
    if rng.random() < 0.5:
        question = rng.choice(STORY_ABOUT).format(hero)
    thought = f"I tell a story about a {hero}."
    text = story_text(hero, _sentences(question))
    return ask("story", question, text, thought, key=question + hero)
