"""The submodules of a model, listed at once."""

from __future__ import annotations

from torch import nn


def named_submodules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` yields, several times faster for a model of thousands of modules.

    Args:
        model: any module.

    Returns:
        Each module once, the model among them, with its path, in the order of ``named_modules``.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh())
        >>> [name for name, _ in named_submodules(model)]
        ['', '0', '0.0', '1']
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        children = module._modules
        if children:
            prefix = f"{name}." if name else ""
            waiting += [
                (prefix + key, child) for key, child in reversed(children.items()) if child is not None
            ]
    return found
