"""Whether a module runs compiled code, by all the ways there are to compile one."""

from __future__ import annotations

from torch import nn

from lightning_memtrain.compat.lightning_private import was_compiled


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
        "_orig_mod" in module._modules  # `torch.compile(module)` keeps the module in this attribute
        or module._compiled_call_impl is not None  # `module.compile()`
        or was_compiled(module)  # taken over by Lightning
    )
