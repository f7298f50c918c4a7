"""Which buffers of a model count or average, by the text of its code: half precision would spoil them.

A count in bfloat16 stops at 256, whose next number is 258, and an average in which a batch weighs 0.001 stops
far from its value. What is only overwritten (a queue of samples, a cached table) loses no more than any
activation does.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memtrain.compat.lightning_names import PACKAGES

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
# float32 has all whole numbers up to here.
_LARGEST_WHOLE = 2.0**24
_FOREIGN = ("torch", "torchmetrics", *PACKAGES)

# All weights of a module, in place of a name.
_ALL = "*"

#: The last names of an attribute: ``("stats", "n")`` for ``self.stats.n``, ``(None, "n")`` for ``self.n``.
Chain = tuple[str | None, str]


_KINDS = _LOOSELY, _STRICTLY, _OVERWRITTEN = "loosely", "strictly", "overwritten"


class Written(NamedTuple):
    """Attributes that code writes to.

    Args:
        accumulated: new values are made of old ones.
        strictly: so, and by operators that want all that they get in one dtype, or may be such.
        overwritten: new values replace the old ones.
    """

    accumulated: frozenset[Chain]
    strictly: frozenset[Chain]
    overwritten: frozenset[Chain]


class BufferUse:
    """Tells which buffers of a model are statistics.

    Args:
        model: whose classes are read; those of torch and Lightning are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._by_class: dict[type, Written] = {}
        self._parents: dict[int, set[str]] = defaultdict(set)  # names that a module goes by
        elsewhere: tuple[set[Chain], ...] = set(), set(), set()
        for module in model.modules():
            for name, child in module.named_children():
                self._parents[id(child)].add(name)
            kind = type(module)
            if kind not in self._by_class:
                own = self._by_class[kind] = _written_by(kind.__mro__)
                for found, chains in zip(elsewhere, own, strict=True):
                    found |= {chain for chain in chains if chain[0] is not None}
        self._elsewhere = elsewhere

    def accumulates(self, layer: nn.Module, name: str) -> bool:
        """Whether the model's code makes new values of a buffer of old ones.

        Args:
            layer: one of the model's.
            name: of the buffer.

        Returns:
            ``False`` also where there is no code to read.
        """
        return self._is_in(0, layer, name)

    def accumulates_strictly(self, layer: nn.Module, name: str) -> bool:
        """Whether that fails where inputs are in half precision and the buffer is not.

        Args:
            layer: one of the model's.
            name: of the buffer.

        Returns:
            ``True`` for ``lerp_``, ``index_add_`` and their like, and for functions that are not looked into.
        """
        return self._is_in(1, layer, name)

    def overwrites(self, layer: nn.Module, name: str) -> bool:
        """Whether the model's code replaces the values of a buffer.

        Args:
            layer: one of the model's.
            name: of the buffer.

        Returns:
            ``False`` also where there is no code to read.
        """
        return self._is_in(2, layer, name)

    def averages(self, module: nn.Module) -> bool:
        """Whether the model's code makes new weights of a module of old ones, as those of a mean teacher.

        Args:
            module: one of the model's.

        Returns:
            ``False`` also where there is no code to read.
        """
        return any((name, _ALL) in self._elsewhere[0] for name in self._parents[id(module)])

    def _is_in(self, which: int, layer: nn.Module, name: str) -> bool:
        own = self._by_class.get(type(layer))
        names = {(parent, name) for parent in self._parents[id(layer)]} | {("", name)}
        return (own is not None and (None, name) in own[which]) or bool(names & self._elsewhere[which])


def holds_whole_numbers(buffer: Tensor, dtype: torch.dtype) -> bool:
    """Whether a buffer holds whole numbers, some of which a dtype does not have.

    Args:
        buffer: of floating-point numbers.
        dtype: a half precision.

    Returns:
        ``True`` for positions and identities above 256 in bfloat16, and above 2048 in float16; ``False`` for
        masks, whose one large number need not be exact.
    """
    if buffer.is_meta or buffer.numel() == 0:
        return False
    values = buffer.detach().float()
    if not bool((values == values.round()).all()) or not bool((values.abs() < _LARGEST_WHOLE).all()):
        return False
    inexact = values[values.to(dtype).float() != values]
    return inexact.numel() > 0 and bool(inexact.min() != inexact.max())


@lru_cache(maxsize=512)
def _written_by(classes: tuple[type, ...]) -> Written:
    """What the methods of a class and its parents write to."""
    found: dict[str, set[Chain]] = {kind: set() for kind in _KINDS}
    for parent in classes:
        if parent.__module__.partition(".")[0] in _FOREIGN or parent is object:
            continue
        for name, member in vars(parent).items():
            tree = None if _SETUP.fullmatch(name) else _parsed(member)
            if tree is not None:
                aliases = _aliases(tree)
                for node in ast.walk(tree):
                    for chain, kind in _writes(node, aliases):
                        found[kind].add(chain)
    accumulated = found[_LOOSELY] | found[_STRICTLY]
    return Written(
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


def _writes(node: ast.AST, aliases: dict[str, Chain]) -> Iterator[tuple[Chain, str]]:
    """Attributes that a statement or call writes to, and how."""
    if isinstance(node, ast.AugAssign):
        yield from ((chain, _LOOSELY) for chain in _chain(node.target, aliases))
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, (ast.Attribute, ast.Subscript)):
                for chain in _chain(target, aliases):
                    yield chain, _LOOSELY if chain in _computed_with(node.value, aliases) else _OVERWRITTEN
    elif isinstance(node, ast.Call):
        yield from _written_in_call(node, aliases)


def _written_in_call(call: ast.Call, aliases: dict[str, Chain]) -> Iterator[tuple[Chain, str]]:
    name = _name_of(call)
    if isinstance(call.func, ast.Attribute) and name.endswith("_"):
        made_of = {chain for argument in call.args for chain in _computed_with(argument, aliases)}
        for chain in _chain(call.func.value, aliases):
            if _ARITHMETIC.fullmatch(name[:-1]):
                yield chain, _LOOSELY
            elif _STRICT_ARITHMETIC.fullmatch(name[:-1]):
                yield chain, _STRICTLY
            elif _OVERWRITING.fullmatch(name[:-1]):
                yield chain, _LOOSELY if chain in made_of else _OVERWRITTEN
    if _HELPER.search(name) and call.args:
        yield from ((chain, _STRICTLY) for chain in _chain(call.args[0], aliases))
    if _NORMALISING.search(name):
        for argument in (*call.args[1:3], *(keyword.value for keyword in call.keywords)):
            yield from ((chain, _STRICTLY) for chain in _chain(argument, aliases))
    for keyword in call.keywords:
        if keyword.arg == "out":
            made_of = {chain for argument in call.args for chain in _chains_in(argument, aliases)}
            for chain in _chain(keyword.value, aliases):
                yield chain, _STRICTLY if chain in made_of else _OVERWRITTEN


def _name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else str(getattr(call.func, "id", ""))


def _computed_with(node: ast.AST, aliases: dict[str, Chain]) -> set[Chain]:
    """Attributes that a value is computed with; not those that are only moved, cast or cut."""
    found: set[Chain] = set()
    for inner in ast.walk(node):
        name = _name_of(inner).rstrip("_") if isinstance(inner, ast.Call) else ""
        computes = (
            _ARITHMETIC.fullmatch(name) or _STRICT_ARITHMETIC.fullmatch(name) or _COMPARING.search(name)
        )
        if computes or isinstance(inner, ast.BinOp):
            found |= _chains_in(inner, aliases)
    return found


def _chain(node: ast.AST, aliases: dict[str, Chain]) -> list[Chain]:
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


def _chains_in(node: ast.AST, aliases: dict[str, Chain]) -> set[Chain]:
    return {chain for inner in ast.walk(node) for chain in _chain(inner, aliases)}


def _aliases(function: ast.AST) -> dict[str, Chain]:
    """Names that stand for attributes: ``mean = self.mean``, ``for p in self.teacher.parameters()``."""
    found: dict[str, Chain] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.For):
            found |= _weights_gone_through(node.target, node.iter)
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Attribute):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name):
                found |= dict.fromkeys([target.id], *_chain(node.value, {}))
    return found


def _weights_gone_through(target: ast.expr, values: ast.expr) -> dict[str, Chain]:
    """Names that stand for all weights of a module in a loop, alone or beside those of others."""
    if not isinstance(values, ast.Call):
        return {}
    name = _name_of(values)
    if name == "zip" and isinstance(target, ast.Tuple):
        pairs = zip(target.elts, values.args, strict=False)
        return {key: chain for pair in pairs for key, chain in _weights_gone_through(*pair).items()}
    if isinstance(target, ast.Tuple) and name.startswith("named_"):
        target = target.elts[-1]
    owner = values.func.value if isinstance(values.func, ast.Attribute) else None
    if owner is None or not isinstance(target, ast.Name) or not _WEIGHTS.fullmatch(name):
        return {}
    modules = [owner.id] if isinstance(owner, ast.Name) else [chain[1] for chain in _chain(owner, {})]
    return dict.fromkeys([target.id], (modules[0], _ALL)) if modules else {}
