"""Whether a module runs compiled code, by all the ways there are to compile one."""

from __future__ import annotations

from torch import nn

from lightning_memtrain.compat.lightning_private import was_compiled

#: Where what `torch.compile(module)` returns keeps the module.
_ORIGINAL = "_orig_mod"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled as a whole.

    Args:
        module: any module.

    Returns:
        Whether it is what ``torch.compile(module)`` returned, ``module.compile()`` was called, or Lightning
        took over a compiled module. What it contains, or is contained in, is not asked.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.compile()
        >>> is_compiled(layer), is_compiled(nn.Linear(2, 2))
        (True, False)
    """
    return (
        before_compilation(module) is not module  # what `torch.compile(module)` returned
        or module._compiled_call_impl is not None  # `module.compile()`
        or was_compiled(module)  # taken over by Lightning
    )


def before_compilation(module: nn.Module) -> nn.Module:
    """Find the module that was handed to ``torch.compile``.

    Args:
        module: any module.

    Returns:
        What ``module`` was made from, if ``torch.compile(...)`` returned it; else ``module``.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before_compilation(layer) is layer
        True
    """
    if _ORIGINAL not in module._modules:  # what TorchScript keeps there has no `get`
        return module
    return module._modules[_ORIGINAL] or module
