"""Finding the parts of a model that are worth recomputing as a whole: its repeated blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Chain = list[tuple[str, nn.Module]]
"""Paths and modules of blocks of one kind, in the order of the model."""


def repeated_blocks(model: nn.Module) -> list[Chain]:
    """The blocks that a model consists of, as chains of siblings of one kind.

    A block is a module with submodules of its own that has siblings of the same class. Where blocks consist
    of blocks in turn (stages of layers), those that form the longest chain count; containers such as
    ``nn.Sequential`` count only where nothing in them is repeated. A module in two places counts
    in the first.

    Args:
        model: any module.

    Returns:
        One chain per parent, each of at least two blocks.

    Example:
        >>> layer = lambda: nn.TransformerEncoderLayer(8, 2)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(layer(), layer()))
        >>> [[name for name, _ in chain] for chain in repeated_blocks(model)]
        [['1.0', '1.1']]
    """
    seen: set[int] = set()
    chains = []
    for chain in _chains("", model):
        own = [(name, block) for name, block in chain if id(block) not in seen]
        seen.update(id(block) for _, block in own)
        if len(own) > 1:
            chains.append(own)
    return chains


def _chains(path: str, module: nn.Module) -> list[Chain]:
    children = [(f"{path}.{name}".lstrip("."), child) for name, child in _composite_children(module)]
    inside = {name: _chains(name, child) for name, child in children}
    counts = Counter(_kind(child) for _, child in children)
    chains = []
    for kind in counts:
        alike = [(name, child) for name, child in children if _kind(child) == kind]
        inner = [chain for name, _ in alike for chain in inside[name]]
        longest = max((len(chain) for chain in inner), default=0)
        is_container = isinstance(alike[0][1], CONTAINERS)
        if len(alike) < 2 or (inner and (is_container or longest > len(alike))):
            chains += inner
        else:
            chains.append(alike)
    # In the order of the model.
    order = {name: place for place, (name, _) in enumerate(children)}
    return sorted(chains, key=lambda chain: next(order[name] for name in order if _is_in(chain[0][0], name)))


def _composite_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return (
        (name, child) for name, child in module.named_children() if next(child.children(), None) is not None
    )


def _kind(module: nn.Module) -> tuple[type[nn.Module], ...]:
    inside = module.children() if isinstance(module, CONTAINERS) else ()
    return type(module), *(type(child) for child in inside)


def _is_in(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def scripted_module(model: nn.Module, name: str) -> str | None:
    """Where TorchScript is in a module, or around it, which can neither be recomputed nor looked into.

    Args:
        model: any module.
        name: path of a module in it.

    Returns:
        Path of the outermost that `torch.jit` has made; ``None`` if there is none.
    """
    parts = name.split(".") if name else []
    around = (".".join(parts[:length]) for length in range(len(parts)))
    modules = [(path, model.get_submodule(path)) for path in around]
    modules += model.get_submodule(name).named_modules(prefix=name)
    return next((path for path, one in modules if isinstance(one, torch.jit.ScriptModule)), None)


def describe_modules(model: nn.Module, most: int = 12) -> str:
    """The classes of a model's modules with their number, for errors.

    Args:
        model: any module.
        most: how many classes to name.

    Returns:
        E.g. ``"12 BertLayer, 1 BertPooler"``; the most frequent first.
    """
    counts = Counter(type(module).__name__ for name, module in model.named_modules() if name)
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common(most))
    rest = len(counts) - most
    return (listed or "no modules") + (f" and {rest} other classes" if rest > 0 else "")
