"""What a chat template reads, found in its syntax tree: words in its prose say nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import jinja2
from jinja2 import meta, nodes


@dataclass(frozen=True)
class TemplateNames:
    """`variables` are those that whoever renders may set. `attributes` are names and keys that are
    looked up in anything, such as a message. `words` are the texts that a variable is compared with
    or looked up by."""

    variables: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    words: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, source: str, environment: jinja2.Environment) -> TemplateNames:
        """Raises jinja2.TemplateError where the source is no template."""
        tree = environment.parse(source)
        every = list(_walked(tree))
        attributes, words = frozenset(_attributes(every)), _words(every)
        variables = frozenset(meta.find_undeclared_variables(tree))  # changes the tree
        return cls(variables, attributes, {n: w for n, w in words.items() if n in variables})

    def __or__(self, other: TemplateNames) -> TemplateNames:
        names = self.words.keys() | other.words.keys()
        return TemplateNames(
            self.variables | other.variables,
            self.attributes | other.attributes,
            {n: self.words.get(n, frozenset()) | other.words.get(n, frozenset()) for n in names},
        )


def _walked(tree: nodes.Node) -> Iterator[nodes.Node]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.iter_child_nodes()


def _attributes(every: Sequence[nodes.Node]) -> Iterator[str]:
    for node in every:
        match node:
            case nodes.Getattr():
                yield node.attr
            case nodes.Getitem():
                yield from _texts(node.arg)
            case nodes.Call(node=nodes.Getattr(attr="get")):
                yield from (text for arg in node.args[:1] for text in _texts(arg))
            case nodes.Compare():
                if any(operand.op in ("in", "notin") for operand in node.ops):
                    yield from _texts(node.expr)


def _words(every: Sequence[nodes.Node]) -> dict[str, frozenset[str]]:
    """Returns the words of each variable, those too of names that were given its value, maybe
    changed or with a default."""
    sources = _sources(every)
    found: dict[str, set[str]] = {}
    for names, words in (*_compared(every), *_looked_up(every)):
        for root in _roots(names, sources):
            found.setdefault(root, set()).update(words)
    return {name: frozenset(words) for name, words in found.items()}


def _sources(every: Sequence[nodes.Node]) -> dict[str, set[str]]:
    """Returns for each name that is set the names in what it is set to."""
    found: dict[str, set[str]] = {}
    for node in every:
        if isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name):
            found.setdefault(node.target.name, set()).update(_names(node.node))
    return found


def _roots(names: Iterable[str], sources: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += sources.get(name, ())
    return seen


def _compared(every: Sequence[nodes.Node]) -> Iterator[tuple[set[str], set[str]]]:
    for compare in every:
        if not isinstance(compare, nodes.Compare):
            continue
        sides = [compare.expr, *(operand.expr for operand in compare.ops)]
        is_name = [bool(_names(side)) for side in sides]
        if any(is_name) and not all(is_name):
            names = {name for side in sides for name in _names(side)}
            yield names, {text for side in sides for text in _texts(side)}


def _looked_up(every: Sequence[nodes.Node]) -> Iterator[tuple[set[str], set[str]]]:
    tables = {
        node.target.name: node.node
        for node in every
        if isinstance(node, nodes.Assign)
        and isinstance(node.target, nodes.Name)
        and isinstance(node.node, nodes.Dict)
    }
    for item in every:
        if not isinstance(item, nodes.Getitem):
            continue
        table = tables.get(item.node.name) if isinstance(item.node, nodes.Name) else item.node
        if isinstance(table, nodes.Dict):
            keys = {text for pair in table.items for text in _texts(pair.key)}
            yield _names(item.arg), keys


def _names(node: nodes.Node) -> set[str]:
    """Returns the names in an expression, but not those of which only a member is read."""
    if isinstance(node, nodes.Name):
        return {node.name}
    if isinstance(node, nodes.Getattr | nodes.Getitem):
        return set()
    if isinstance(node, nodes.Call):
        inner = node.node.node if isinstance(node.node, nodes.Getattr) else node.node
        return _names(inner)
    return {name for child in node.iter_child_nodes() for name in _names(child)}


def _texts(node: nodes.Node | None) -> Iterator[str]:
    if isinstance(node, nodes.Const):
        if isinstance(node.value, str):
            yield node.value
    elif isinstance(node, nodes.List | nodes.Tuple):
        for item in node.items:
            yield from _texts(item)
