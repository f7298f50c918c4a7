"""Which attributes the methods of a class write to, by the text of their code."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from lightning_memtrain.compat.lightning_packages import PACKAGES

_ARITHMETIC = re.compile(r"add|sub|mul|div")
# They want all that they get in one dtype.
_STRICT_ARITHMETIC = re.compile(
    r"(index_|scatter_)(add|reduce)|lerp|addc(mul|div)|add(mm|mv|r|bmm)|baddbmm|logaddexp"
)
_OVERWRITING = re.compile(r"(index_)?(copy|fill)|zero|set|masked_fill|scatter|resize|normal|uniform")
_HELPER = re.compile(r"(^|_)(ema|inplace|moving|running|accumulate|average)(_|$)", re.IGNORECASE)
_COMPARING = re.compile(r"^(maximum|minimum|max|min|where)$|(^|_)(ema|moving|running|average)(_|$)")
_NORMALISING = re.compile(r"(batch|instance)_norm")
_WEIGHTS = re.compile(r"(named_)?(parameters|buffers)")
_SETUP = re.compile(r"__init__|_?(reset|init)\w*|configure_model|setup")
_FOREIGN = ("torch", "torchmetrics", *PACKAGES)

# All weights of a module, in place of a name.
ALL_WEIGHTS = "*"

#: The last names of an attribute: ``("stats", "n")`` for ``self.stats.n``, ``(None, "n")`` for ``self.n``.
AttributePath = tuple[str | None, str]


_KINDS = _LOOSELY, _STRICTLY, _OVERWRITTEN = "loosely", "strictly", "overwritten"


class WrittenAttributes(NamedTuple):
    """Attributes that code writes to.

    Args:
        accumulated: new values are made of old ones.
        strictly: so, and by operators that want all that they get in one dtype, or may be such.
        overwritten: new values replace the old ones.
    """

    accumulated: frozenset[AttributePath]
    strictly: frozenset[AttributePath]
    overwritten: frozenset[AttributePath]


@lru_cache(maxsize=512)
def attributes_written_by(classes: tuple[type, ...]) -> WrittenAttributes:
    """What the methods of a class and its parents write to.

    Args:
        classes: the class and its parents, as in ``__mro__``; those of torch and Lightning are not read.

    Returns:
        Nothing for methods whose text is not found.
    """
    found: dict[str, set[AttributePath]] = {kind: set() for kind in _KINDS}
    for parent in classes:
        if parent.__module__.partition(".")[0] in _FOREIGN or parent is object:
            continue
        for name, member in vars(parent).items():
            tree = None if _SETUP.fullmatch(name) else _parsed(member)
            if tree is not None:
                aliases = _aliases(tree)
                for node in ast.walk(tree):
                    for path, kind in _writes(node, aliases):
                        found[kind].add(path)
    accumulated = found[_LOOSELY] | found[_STRICTLY]
    return WrittenAttributes(
        frozenset(accumulated), frozenset(found[_STRICTLY]), frozenset(found[_OVERWRITTEN] - accumulated)
    )


def _parsed(member: Any) -> ast.Module | None:
    """The text of a method or property; ``None`` for what is none, or has no text."""
    function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
    function = inspect.unwrap(function) if callable(function) else None
    if not inspect.isfunction(function):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, ValueError):
        return None


def _writes(node: ast.AST, aliases: dict[str, AttributePath]) -> Iterator[tuple[AttributePath, str]]:
    """Attributes that a statement or call writes to, and how."""
    if isinstance(node, ast.AugAssign):
        yield from ((path, _LOOSELY) for path in _paths_of(node.target, aliases))
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, (ast.Attribute, ast.Subscript)):
                for path in _paths_of(target, aliases):
                    yield path, _LOOSELY if path in _computed_with(node.value, aliases) else _OVERWRITTEN
    elif isinstance(node, ast.Call):
        yield from _written_in_call(node, aliases)


def _written_in_call(
    call: ast.Call, aliases: dict[str, AttributePath]
) -> Iterator[tuple[AttributePath, str]]:
    name = _name_of(call)
    if isinstance(call.func, ast.Attribute) and name.endswith("_"):
        made_of = {path for argument in call.args for path in _computed_with(argument, aliases)}
        for path in _paths_of(call.func.value, aliases):
            if _ARITHMETIC.fullmatch(name[:-1]):
                yield path, _LOOSELY
            elif _STRICT_ARITHMETIC.fullmatch(name[:-1]):
                yield path, _STRICTLY
            elif _OVERWRITING.fullmatch(name[:-1]):
                yield path, _LOOSELY if path in made_of else _OVERWRITTEN
    if _HELPER.search(name) and call.args:
        yield from ((path, _STRICTLY) for path in _paths_of(call.args[0], aliases))
    if _NORMALISING.search(name):
        for argument in (*call.args[1:3], *(keyword.value for keyword in call.keywords)):
            yield from ((path, _STRICTLY) for path in _paths_of(argument, aliases))
    for keyword in call.keywords:
        if keyword.arg == "out":
            made_of = {path for argument in call.args for path in _paths_in(argument, aliases)}
            for path in _paths_of(keyword.value, aliases):
                yield path, _STRICTLY if path in made_of else _OVERWRITTEN


def _name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else str(getattr(call.func, "id", ""))


def _computed_with(node: ast.AST, aliases: dict[str, AttributePath]) -> set[AttributePath]:
    """Attributes that a value is computed with; not those that are only moved, cast or cut."""
    found: set[AttributePath] = set()
    for inner in ast.walk(node):
        name = _name_of(inner).rstrip("_") if isinstance(inner, ast.Call) else ""
        computes = (
            _ARITHMETIC.fullmatch(name) or _STRICT_ARITHMETIC.fullmatch(name) or _COMPARING.search(name)
        )
        if computes or isinstance(inner, ast.BinOp):
            found |= _paths_in(inner, aliases)
    return found


def _paths_of(node: ast.AST, aliases: dict[str, AttributePath]) -> list[AttributePath]:
    """The attribute that an expression is, or is a part or the data of; nothing for other expressions."""
    while isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr == "data"):
        node = node.value
    if isinstance(node, ast.Name):
        return [aliases[node.id]] if node.id in aliases else []
    if not isinstance(node, ast.Attribute):
        return []
    owner: ast.AST = node.value
    while isinstance(owner, ast.Subscript):
        owner = owner.value
    if isinstance(owner, ast.Attribute):
        return [(owner.attr, node.attr)]
    if isinstance(owner, ast.Name):
        return [(None if owner.id == "self" else "", node.attr)]
    return []


def _paths_in(node: ast.AST, aliases: dict[str, AttributePath]) -> set[AttributePath]:
    return {path for inner in ast.walk(node) for path in _paths_of(inner, aliases)}


def _aliases(function: ast.AST) -> dict[str, AttributePath]:
    """Names that stand for attributes: ``mean = self.mean``, ``for p in self.teacher.parameters()``."""
    found: dict[str, AttributePath] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.For):
            found |= _names_in_a_loop(node.target, node.iter)
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Attribute):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name):
                found |= dict.fromkeys([target.id], *_paths_of(node.value, {}))
    return found


def _names_in_a_loop(target: ast.expr, values: ast.expr) -> dict[str, AttributePath]:
    """Names that stand for all weights of a module in a loop, alone or beside those of others."""
    if not isinstance(values, ast.Call):
        return {}
    name = _name_of(values)
    if name == "zip" and isinstance(target, ast.Tuple):
        pairs = zip(target.elts, values.args, strict=False)
        return {key: path for pair in pairs for key, path in _names_in_a_loop(*pair).items()}
    if isinstance(target, ast.Tuple) and name.startswith("named_"):
        target = target.elts[-1]
    owner = values.func.value if isinstance(values.func, ast.Attribute) else None
    if owner is None or not isinstance(target, ast.Name) or not _WEIGHTS.fullmatch(name):
        return {}
    modules = [owner.id] if isinstance(owner, ast.Name) else [path[1] for path in _paths_of(owner, {})]
    return dict.fromkeys([target.id], (modules[0], ALL_WEIGHTS)) if modules else {}
