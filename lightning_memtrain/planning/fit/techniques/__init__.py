"""What can be switched on to make a step need less, one small class for each."""

from lightning_memtrain.planning.fit.techniques.compressed_activations import ActivationsIn8Bits
from lightning_memtrain.planning.fit.techniques.half_precision import WeightsInBfloat16
from lightning_memtrain.planning.fit.techniques.small_state import StateIn8Bits
from lightning_memtrain.planning.fit.techniques.steps_in_backward import StepsInBackward
from lightning_memtrain.planning.fit.techniques.switch import Switch

#: All that a plan may switch on, those that leave the result as it is first.
SWITCHES: tuple[Switch, ...] = (
    StepsInBackward(),
    WeightsInBfloat16(),
    StateIn8Bits(),
    ActivationsIn8Bits(),
)

__all__ = ["SWITCHES", "Switch"]
