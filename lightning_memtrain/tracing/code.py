"""What the code of a function names, and so can reach and change."""

from __future__ import annotations

from opcode import opmap
from types import CodeType
from typing import NamedTuple

_STORES = tuple(opmap[name] for name in ("STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL"))
_IMPORTS = opmap["IMPORT_NAME"]


class Names(NamedTuple):
    """What a function names, with the functions that are written in it.

    Args:
        read: names of globals, attributes and modules.
        spelt: texts in it that could be names of attributes.
        stores: whether it assigns to globals or attributes.
        imports: whether it imports.
    """

    read: tuple[str, ...]
    spelt: tuple[str, ...]
    stores: bool
    imports: bool


_known: dict[int, tuple[CodeType, Names]] = {}


def names_in(code: CodeType) -> Names:
    """What code names.

    Args:
        code: of a function.

    Returns:
        The names; found once for each code object of the process.
    """
    known = _known.get(id(code))
    if known is not None:
        return known[1]
    read: dict[str, None] = {}
    spelt: dict[str, None] = {}
    stores = imports = False
    pending = [code]
    while pending:
        one = pending.pop()
        read.update(dict.fromkeys(one.co_names))
        operations = one.co_code[::2]
        stores = stores or any(operation in operations for operation in _STORES)
        imports = imports or _IMPORTS in operations
        for constant in one.co_consts:
            if type(constant) is CodeType:
                pending.append(constant)
            elif type(constant) is str and constant.isidentifier():
                spelt[constant] = None
    names = Names(tuple(read), tuple(spelt), stores, imports)
    _known[id(code)] = code, names  # the code is kept, so that its id stays its own
    return names
