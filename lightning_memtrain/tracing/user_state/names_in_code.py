"""What the code of a function names, and so can reach and change."""

from __future__ import annotations

from opcode import opmap
from types import CodeType
from typing import NamedTuple

_STORES = tuple(opmap[name] for name in ("STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL"))
_IMPORTS = opmap["IMPORT_NAME"]


class CodeNames(NamedTuple):
    """What a function names, with the functions that are written in it.

    Args:
        named: names of globals, attributes and modules, and texts in it that could be such.
        stores: whether it assigns to globals or attributes.
        imports: whether it imports.
    """

    named: tuple[str, ...]
    stores: bool
    imports: bool


_known: dict[int, tuple[CodeType, CodeNames]] = {}


def names_in(code: CodeType) -> CodeNames:
    """What code names.

    Args:
        code: of a function.

    Returns:
        The names; found once for each code object of the process.
    """
    known = _known.get(id(code))
    if known is not None:
        return known[1]
    named: dict[str, None] = {}
    stores = imports = False
    pending = [code]
    while pending:
        one = pending.pop()
        named.update(dict.fromkeys(one.co_names))
        operations = one.co_code[::2]
        stores = stores or any(operation in operations for operation in _STORES)
        imports = imports or _IMPORTS in operations
        for constant in one.co_consts:
            if type(constant) is CodeType:
                pending.append(constant)
            for text in constant if type(constant) in (tuple, frozenset) else (constant,):
                if type(text) is str and text.isidentifier():
                    named[text] = None
    names = CodeNames(tuple(named), stores, imports)
    _known[id(code)] = code, names  # the code is kept, so that its id stays its own
    return names
