"""An OpenAPI document as one page of HTML: no scripts, nothing from other hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Json = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
code { font: 0.9em ui-monospace, monospace; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #8884; padding: 0.3rem 1rem 0.3rem 0; vertical-align: top; }
td:first-child { white-space: nowrap; }
small { opacity: 0.75; }
"""
LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} letters",
    "maxLength": "at most {} letters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "maxProperties": "at most {}",
    "pattern": "like {}",
}


def front_page(links: Mapping[str, str], version: str) -> str:
    """Returns the page at `/` with `links`, which are paths by what they are called."""
    items = (f"<li><a href={path}>{path}</a>: {escape(name)}" for name, path in links.items())
    about = (
        "A server for language models, with OpenAI's API. Clients take the address of this page, "
        "with <code>/v1</code> or without."
    )
    return "\n".join([*_head(f"mlx-lm-server {version}"), f"<p>{about}</p><ul>", *items, "</ul>"])


def _head(title: str) -> list[str]:
    return [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>",
    ]


def page(document: Json) -> str:
    info = document["info"]
    parts = [
        *_head(f"{info['title']} {info['version']}"),
        f"<p>{_text(info['description'])} <a href=openapi.json>openapi.json</a></p>",
        *_operations(document["paths"]),
        "<h2>Objects</h2>",
        *(_object(name, one) for name, one in document["components"]["schemas"].items()),
    ]
    return "\n".join(parts)


def _operations(paths: Json) -> Iterator[str]:
    group = None
    for path, methods in paths.items():
        for method, operation in methods.items():
            [tag] = operation["tags"]
            if tag != group:
                group = tag
                yield f"<h2>{escape(tag)}</h2>"
            yield f"<h3><code>{method.upper()} {escape(path)}</code></h3>"
            yield f"<p>{_text(operation['summary'])}</p><table>"
            if "requestBody" in operation:
                yield _row("body", _contents(operation["requestBody"]), "")
            for status, response in operation["responses"].items():
                yield _row(status, _contents(response), _text(response["description"]))
            yield "</table>"


def _contents(holder: Json) -> str:
    found = []
    for kind, content in holder["content"].items():
        schema = content["schema"]
        if "properties" in schema:  # of an event
            schema = schema["properties"]["data"]["anyOf"][0]["contentSchema"]
        found.append(f"<small>{escape(kind)}</small> {_kind(schema)}")
    return "<br>".join(found)


def _object(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = []
    for field, one in schema.get("properties", {}).items():
        mark = " <small>required</small>" if field in required else ""
        rows.append(_row(field, _kind(one) + mark, _text(one.get("description", ""))))
    about = _text(schema.get("description", ""))
    head = f"<h3 id={escape(name)}><code>{escape(name)}</code></h3><p>{about}</p>"
    return f"{head}<table>{''.join(rows)}</table>"


def _row(name: str, kind: str, about: str) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{about}</td></tr>"


def _kind(schema: Json) -> str:
    """A type with its limits, in a few words; null goes without saying."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        options = [_kind(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(options)
    if "enum" in schema:
        return ", ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(json.dumps(schema['const']))}</code>"
    limits = [text.format(schema[key]) for key, text in LIMITS.items() if key in schema]
    kind = str(schema.get("type", "anything"))
    if "items" in schema:
        kind = f"list of {_kind(schema['items'])}"
    return kind + (f" <small>{escape(', '.join(limits))}</small>" if limits else "")


def _text(words: str) -> str:
    """`code` in Markdown's marks."""
    parts = escape(words).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
