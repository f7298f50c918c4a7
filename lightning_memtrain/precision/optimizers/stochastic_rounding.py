r"""Stochastic rounding: numbers in half precision that are right on average.

A float32 value :math:`x` between neighbours :math:`a < b` of a smaller format becomes :math:`b` with
probability :math:`(x - a) / (b - a)` and else :math:`a`, so that its expectation is :math:`x`. Updates too
small to move a weight by themselves then move it once in a while, where rounding to nearest would drop all.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from lightning_memtrain.coordination import dry_run_depth
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_counts, check_kinds

# Low bits of a float32 mantissa that a format has no room for.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def stochastic_round(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    r"""Round float32 numbers to a half precision without bias.

    Rounded to nearest instead: what is infinite or not a number; what lies at or beyond the largest finite
    number of ``dtype``; and, for float16, what lies below its smallest normal number :math:`2^{-14}`, where
    neighbours are at most :math:`6 \cdot 10^{-8}` apart. Numbers that ``dtype`` has are never changed.

    Args:
        values: float32, of any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: where the noise comes from, on the device of ``values``. The global one is left alone.

    Returns:
        ``values`` in ``dtype``.

    Raises:
        ArgumentError: if ``values`` are not float32 or ``dtype`` is none of the two.

    Example:
        >>> noise = torch.Generator().manual_seed(0)
        >>> third = torch.full((100_000,), 1 + 2**-8 / 3)  # bfloat16 has 1 and 1 + 2**-7
        >>> rounded = stochastic_round(third, torch.bfloat16, noise)
        >>> sorted(set(rounded.tolist()))
        [1.0, 1.0078125]
        >>> round((rounded.double().mean().item() - 1) * 2**8, 2)
        0.33
    """
    check_kinds("stochastic_round", Tensor, "a tensor", "Pass one in float32.", values=values)
    return stochastic_round_(values.clone(), dtype, generator).to(dtype)


@torch.no_grad()
def stochastic_round_(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round as :func:`stochastic_round`, in place: to numbers that ``dtype`` has, which stay float32.

    Args:
        values: float32, of any shape, dense; overwritten.
        dtype: see :func:`stochastic_round`.
        generator: see :func:`stochastic_round`.

    Returns:
        ``values``, those that are rounded to nearest excepted: these are for the caller's ``to(dtype)``.

    Raises:
        ArgumentError: see :func:`stochastic_round`.
    """
    kind, cure = torch.Generator, "Write e.g. torch.Generator(values.device)."
    check_kinds("stochastic_round", kind, "a torch.Generator", cure, generator=generator)
    if dtype not in _DROPPED_BITS:
        raise ArgumentError(
            f"`stochastic_round(dtype)` must be torch.bfloat16 or torch.float16, but got dtype={dtype}. "
            "Round to one of these, or use `values.to(dtype)`."
        )
    if values.dtype != torch.float32:
        raise ArgumentError(
            f"`stochastic_round(values)` must be float32, but got {values.dtype}. Use `values.float()`."
        )
    limits = torch.finfo(dtype)
    size = 1 << _DROPPED_BITS[dtype]
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16 and _are_all_within(values, limits.max):
        # A carry out of the dropped bits is the step to the neighbour that is farther from zero.
        bits.add_(torch.empty_like(bits).random_(size, generator=generator)).bitwise_and_(-size)
        return values
    magnitude = values.abs()
    eligible = magnitude < limits.max  # not so for infinity and NaN, whose bits must not be added to
    if dtype == torch.float16:
        eligible &= magnitude >= limits.tiny
    del magnitude
    rounded = torch.empty_like(bits).random_(size, generator=generator).add_(bits).bitwise_and_(-size)
    torch.where(eligible, rounded, bits, out=bits)
    return values


def _are_all_within(values: Tensor, limit: float) -> bool:
    """Whether magnitudes are smaller; devices that would have to be waited for are not asked."""
    if values.device.type != "cpu" or not values.numel():
        return False
    lowest, highest = values.aminmax()  # both NaN if one number is
    if dry_run_depth():
        return True  # as nearly always: a step without data has no numbers to look at
    return bool(-limit < lowest) and bool(highest < limit)


class RoundingNoise:
    """Noise for stochastic rounding that depends on a seed and the number of the step, and on nothing else.

    Every step has generators of its own. So the state is two numbers, which mean the same on any device;
    the global generators are neither used nor disturbed; and all ranks of a run, which round equal weights,
    round them equally.

    Args:
        seed: any integer.

    Example:
        >>> first, again = RoundingNoise(seed=3), RoundingNoise(seed=3)
        >>> first.next_step()
        >>> again.load_state_dict(first.state_dict())
        >>> cpu = torch.device("cpu")
        >>> torch.equal(*(torch.rand(2, generator=noise.generator(cpu)) for noise in (first, again)))
        True
    """

    def __init__(self, seed: int) -> None:
        check_counts("RoundingNoise", None, "Use e.g. 0.", seed=seed)
        self._first = {"seed": seed, "step": 0}
        self._seed, self._step = seed, 0
        self._generators: dict[torch.device, torch.Generator] = {}

    def restart(self) -> None:
        """Begin anew with the first step."""
        self.load_state_dict(self._first)

    def next_step(self) -> None:
        """Go on to the noise of the next step."""
        self._step += 1
        self._generators.clear()

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of this step.

        Args:
            device: where the noise is to be made.

        Returns:
            The same object throughout a step.
        """
        if device not in self._generators:
            # Hashed: seeds that differ in few bits give generators that resemble each other.
            digest = hashlib.blake2b(f"{self._seed} {self._step}".encode(), digest_size=4).digest()
            self._generators[device] = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
        return self._generators[device]

    def state_dict(self) -> dict[str, int]:
        """Seed and number of the step."""
        return {"seed": self._seed, "step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on as the noise that was saved.

        Args:
            state: of :meth:`state_dict`.
        """
        self._seed, self._step = state["seed"], state["step"]
        self._generators.clear()
