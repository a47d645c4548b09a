"""Answer in JSON of a given schema, and call one of the given tools and use its result."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from ..exchange import Exchange, Message, ask
from ..words import ANIMALS, CITIES, COLORS, FOODS, JOBS, NAMES, NOUNS, plural, pseudo_word

Fact = tuple[str, dict[str, Any], dict[str, Any]]

SCHEMA_FIRST = (
    "Answer in JSON with this schema: {schema}\n{fact}",
    "Answer in JSON that follows this schema: {schema}\n\n{fact}",
    "Extract the data as JSON with the schema {schema}: {fact}",
    "Fill this JSON schema: {schema}\n{fact}",
)
SCHEMA_LAST = (
    "{fact} Answer in JSON with this schema: {schema}",
    "{fact}\nFill this JSON schema: {schema}",
    "{fact}\n\nAnswer in JSON that follows this schema: {schema}",
)
SCHEMA_SYSTEM = (
    "Answer in JSON with this schema: {schema}",
    "You answer in JSON that follows this schema: {schema}",
)


def _person(rng: random.Random) -> Fact:
    name, age, city, job = (
        rng.choice(NAMES), rng.randint(1, 99), rng.choice(CITIES), rng.choice(JOBS)
    )  # fmt: skip
    fact = rng.choice((
        f"{name} is {age} years old, lives in {city} and works as a {job}.",
        f"{name} is a {job} from {city} and {age} years old.",
        f"My friend {name} is {age}, a {job} in {city}.",
    ))  # fmt: skip
    types = {"name": "string", "age": "integer", "city": "string", "job": "string"}
    return fact, types, {"name": name, "age": age, "city": city, "job": job}


def _order(rng: random.Random) -> Fact:
    food, many, name = rng.choice(FOODS), rng.randint(1, 30), rng.choice(NAMES)
    paid = rng.random() < 0.5
    fact = f"{name} orders {many} {food} and has {'paid' if paid else 'not paid'}."
    types = {"name": "string", "item": "string", "quantity": "integer", "paid": "boolean"}
    return fact, types, {"name": name, "item": food, "quantity": many, "paid": paid}


def _pet(rng: random.Random) -> Fact:
    animal, color, name, age = (
        rng.choice(ANIMALS), rng.choice(COLORS), rng.choice(NAMES), rng.randint(1, 20)
    )  # fmt: skip
    fact = rng.choice((
        f"The {animal} {name} is {color} and {age} years old.",
        f"{name} is a {color} {animal}, {age} years old.",
    ))  # fmt: skip
    types = {"name": "string", "animal": "string", "color": "string", "age": "integer"}
    return fact, types, {"name": name, "animal": animal, "color": color, "age": age}


def _shopping(rng: random.Random) -> Fact:
    items = rng.sample(FOODS, rng.randint(2, 4))
    city, total = rng.choice(CITIES), rng.randint(2, 90)
    fact = f"In {city} we bought {', '.join(items[:-1])} and {items[-1]} for {total} coins."
    types = {"items": "array", "total": "integer", "city": "string"}
    return fact, types, {"items": items, "total": total, "city": city}


def _free(rng: random.Random) -> Fact:
    """Any keys at all: the pairs stand in the text as they will stand in the object."""
    keys = rng.sample([*NOUNS, *(pseudo_word(rng, 2) for _ in range(20))], rng.randint(1, 4))
    values: dict[str, Any] = {}
    for key in keys:
        values[key] = rng.choice((
            rng.choice(NAMES), rng.choice(COLORS), rng.randint(0, 999), pseudo_word(rng)
        ))  # fmt: skip
    joint = rng.choice((" is ", ": ", " = "))
    fact = ", ".join(f"{k}{joint}{v}" for k, v in values.items()) + "."
    types = {k: "integer" if isinstance(v, int) else "string" for k, v in values.items()}
    return fact, types, values


FACTS: tuple[Callable[[random.Random], Fact], ...] = (_person, _order, _pet, _shopping, _free)


def _property(kind: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string"}} if kind == "array" else {"type": kind}


def schema_of(types: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema of an object with all keys required."""
    return {
        "type": "object",
        "properties": {name: _property(kind) for name, kind in types.items()},
        "required": list(types),
    }


def fill_schema(rng: random.Random) -> Exchange:
    """Put the facts of a sentence into an object of the given schema, keys in its order."""
    fact, types, values = rng.choice(FACTS)(rng)
    keys = rng.sample(list(types), rng.randint(1, len(types)))
    schema = json.dumps(schema_of({k: types[k] for k in keys}))
    answer = json.dumps({k: values[k] for k in keys}, ensure_ascii=False)
    thought = f"I need the keys {', '.join(keys)}."
    roll = rng.random()
    if roll < 0.25:
        system = rng.choice(SCHEMA_SYSTEM).format(schema=schema)
        return ask("json", fact, answer, thought, system=system)
    template = rng.choice(SCHEMA_FIRST if roll < 0.7 else SCHEMA_LAST)
    return ask("json", template.format(schema=schema, fact=fact), answer, thought)


# A tool: its description, its parameters, and one use of it.
Use = tuple[str, dict[str, Any], dict[str, Any], str]  # question, arguments, result, answer
Tool = tuple[dict[str, Any], Callable[[random.Random], Use]]


def _tool(name: str, description: str, types: dict[str, str]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": schema_of(types)}
    return {"type": "function", "function": function}


def _use_weather(rng: random.Random) -> Use:
    city, degrees = rng.choice(CITIES), rng.randint(-10, 38)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy", "clear"))
    question = rng.choice((
        "What is the weather in {}?", "How is the weather in {}?", "Weather in {}?",
        "Tell me the weather in {}.", "What's the weather like in {}?",
    )).format(city)  # fmt: skip
    result = {"temperature": degrees, "condition": sky}
    return question, {"city": city}, result, f"In {city} it is {sky} and {degrees} degrees."


def _use_time(rng: random.Random) -> Use:
    city, time = rng.choice(CITIES), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    question = rng.choice((
        "What time is it in {}?", "Tell me the time in {}.", "How late is it in {}?",
    )).format(city)  # fmt: skip
    return question, {"city": city}, {"time": time}, f"It is {time} in {city}."


def _use_multiply(rng: random.Random) -> Use:
    a, b = rng.randint(2, 999), rng.randint(2, 999)
    question = rng.choice((
        "What is {} times {}?", "Multiply {} by {}.", "What is {} * {}?", "Calculate {} x {}.",
    )).format(a, b)  # fmt: skip
    return question, {"a": a, "b": b}, {"result": a * b}, f"The result is {a * b}."


def _use_timer(rng: random.Random) -> Use:
    minutes = rng.randint(1, 90)
    question = rng.choice((
        "Set a timer for {} minutes.", "Start a timer of {} minutes.", "Wake me in {} minutes.",
    )).format(minutes)  # fmt: skip
    answer = f"The timer is set for {minutes} minutes."
    return question, {"minutes": minutes}, {"status": "ok"}, answer


def _use_message(rng: random.Random) -> Use:
    name, text = rng.choice(NAMES), f"{rng.choice(FOODS)} and {rng.choice(FOODS)}"
    question = rng.choice((
        'Send "{1}" to {0}.', "Send {0} the message: {1}", 'Tell {0}: "{1}"',
    )).format(name, text)  # fmt: skip
    return question, {"to": name, "text": text}, {"status": "sent"}, f"I sent it to {name}."


def _use_search(rng: random.Random) -> Use:
    thing, found = plural(rng.choice(NOUNS)), rng.choice(NOUNS)
    question = rng.choice((
        "Search for {}.", "Look for {} on the web.", "Find something about {}.",
    )).format(thing)  # fmt: skip
    return question, {"query": thing}, {"title": found}, f"I found this: {found}."


TOOLS: tuple[Tool, ...] = (
    (_tool("get_weather", "Get the weather of a city", {"city": "string"}), _use_weather),
    (_tool("get_time", "Get the time in a city", {"city": "string"}), _use_time),
    (_tool("multiply", "Multiply two numbers", {"a": "integer", "b": "integer"}), _use_multiply),
    (_tool("set_timer", "Set a timer", {"minutes": "integer"}), _use_timer),
    (_tool("send_message", "Send a message", {"to": "string", "text": "string"}), _use_message),
    (_tool("search", "Search the web", {"query": "string"}), _use_search),
)


def _invented(rng: random.Random) -> Tool:
    """A tool that exists only in this conversation, so the name must be read, not known."""
    verb = rng.choice(("get", "find", "read", "open", "check"))
    noun = rng.choice(NOUNS) if rng.random() < 0.7 else pseudo_word(rng, 2)
    argument = rng.choice(("name", "id", "key", "item", "value", "city"))

    def use(rng: random.Random) -> Use:
        is_number = argument == "id"
        value: Any = rng.randint(1, 999) if is_number else rng.choice(NAMES)
        result = rng.choice((rng.choice(COLORS), rng.randint(1, 999), rng.choice(ANIMALS)))
        question = f"{verb.capitalize()} the {noun} of {value}."
        return question, {argument: value}, {noun: result}, f"The {noun} is {result}."

    kind = "integer" if argument == "id" else "string"
    description = f"{verb.capitalize()} the {noun} of something"
    return _tool(f"{verb}_{noun}", description, {argument: kind}), use


def _some_tools(rng: random.Random) -> list[Tool]:
    known = rng.sample(TOOLS, rng.choice((1, 1, 2, 2, 3)))
    invented = [_invented(rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    tools = known + invented if rng.random() < 0.8 else (invented or known)
    rng.shuffle(tools)
    return tools


def call_tool(rng: random.Random) -> Exchange:
    """Call the right one of the given tools; most often its result is answered too."""
    tools = _some_tools(rng)
    chosen, use = rng.choice(tools)
    question, arguments, result, answer = use(rng)
    name = chosen["function"]["name"]
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages: tuple[Message, ...] = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    )
    if rng.random() < 0.6:
        messages += (
            {"role": "tool", "content": json.dumps(result)},
            {"role": "assistant", "content": answer},
        )
    thought = f"I need the tool {name}."
    schemas = tuple(schema for schema, _ in tools)
    return Exchange("tool", messages, thought, tools=schemas)
