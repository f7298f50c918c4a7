"""The words for what a live byte is used for, and byte counts per word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum

from lightning_memtrain.core.arguments.value_checks import wrong


class Category(str, Enum):
    """What a live tensor storage is used for.

    All but the last are counted by the ledger. :attr:`WORKSPACE` is what the device allocator holds beyond
    them (temporaries inside an operator, rounding, other users of the device), so that all rows together
    are exactly the allocator's figure.

    The three groups of Sohoni et al. 2019 (arXiv:1904.10631) are sums: *model* = parameters + buffers + what
    is held beside (copies of weights, second models), *optimizer* = gradients + optimizer state,
    *activations* = the rest. Of what only several processes have,
    gathered weights belong to the model, unsharded gradients and buckets to the optimizer.
    """

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    ACTIVATIONS = "activations"
    BUFFERS = "buffers"
    INPUTS = "inputs"
    TEMPORARY = "temporary"
    GATHERED_WEIGHTS = "gathered_weights"
    UNSHARDED_GRADIENTS = "unsharded_gradients"
    BUCKETS = "buckets"
    HELD = "held"
    WORKSPACE = "workspace"

    def __str__(self) -> str:
        return self.value

    @property
    def is_usual(self) -> bool:
        """Whether tables have a row of it also where it holds nothing; some only several processes have."""
        return self not in (
            *(Category.GATHERED_WEIGHTS, Category.UNSHARDED_GRADIENTS, Category.BUCKETS, Category.HELD),
        )


_POSITION = {category: position for position, category in enumerate(Category)}


class CategoryBytes(Mapping[Category, int]):
    """Bytes per :class:`Category`; a category that is not given holds 0 bytes. Immutable.

    Args:
        bytes_by_category: bytes of each category; keys may be a :class:`Category` or its value.

    Raises:
        ArgumentError: if a key is no category.

    Example:
        >>> held = CategoryBytes({"parameters": 8, "activations": 24})
        >>> held[Category.ACTIVATIONS], held[Category.GRADIENTS], held.total_bytes
        (24, 0, 32)
    """

    __slots__ = ("_values",)

    def __init__(self, bytes_by_category: Mapping[Category, int] | Mapping[str, int] | None = None) -> None:
        values = [0] * len(_POSITION)
        given = {} if bytes_by_category is None else bytes_by_category
        known = [category.value for category in Category]
        if not isinstance(given, Mapping) or not all(key in known for key in given):
            cure = f"The categories are {', '.join(known)}."
            raise wrong("CategoryBytes", "bytes_by_category", "bytes by category", given, cure)
        for key, value in given.items():
            values[_POSITION[Category(key)]] = int(value)
        self._values = tuple(values)

    @classmethod
    def from_values(cls, values: Iterable[int]) -> CategoryBytes:
        """Bytes in the order of :class:`Category`, one number each.

        Args:
            values: as many numbers as there are categories.

        Returns:
            The same numbers, by category.
        """
        made = cls.__new__(cls)
        made._values = tuple(values)
        return made

    def __getitem__(self, key: Category) -> int:
        return self._values[_POSITION[Category(key)]]

    def __iter__(self) -> Iterator[Category]:
        return iter(_POSITION)

    def __len__(self) -> int:
        return len(_POSITION)

    def __hash__(self) -> int:
        return hash(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CategoryBytes) and self._values == other._values

    def __repr__(self) -> str:
        held = ", ".join(f"{key.value}={value}" for key, value in self.items() if value)
        return f"CategoryBytes({held})"

    @property
    def total_bytes(self) -> int:
        """All categories together."""
        return sum(self._values)

    @property
    def model_bytes(self) -> int:
        """Parameters, buffers, gathered weights, what is held beside: the *model* of Sohoni et al. 2019."""
        own = self[Category.PARAMETERS] + self[Category.BUFFERS]
        return own + self[Category.GATHERED_WEIGHTS] + self[Category.HELD]

    @property
    def optimizer_bytes(self) -> int:
        """Gradients, in every form, and optimizer state: the *optimizer* of Sohoni et al. 2019."""
        of_several = self[Category.UNSHARDED_GRADIENTS] + self[Category.BUCKETS]
        return self[Category.GRADIENTS] + self[Category.OPTIMIZER_STATE] + of_several

    @property
    def activation_bytes(self) -> int:
        """Everything else, workspace included: the *activations* of Sohoni et al. 2019."""
        return self.total_bytes - self.model_bytes - self.optimizer_bytes

    def with_workspace(self, workspace_bytes: int) -> CategoryBytes:
        """The same counts with another workspace row."""
        return CategoryBytes({**self, Category.WORKSPACE: workspace_bytes})

    def to_dict(self) -> dict[str, int]:
        """Plain names and numbers, for JSON."""
        return {key.value: value for key, value in self.items()}
