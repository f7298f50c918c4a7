"""What can be switched on to make a step need less, one small class for each."""

from lightning_memtrain.planning.fit.techniques.activation_bits import (
    ActivationsIn4Bits,
    ActivationsIn8Bits,
)
from lightning_memtrain.planning.fit.techniques.early_release import GradientsFreedEarly
from lightning_memtrain.planning.fit.techniques.host_activations import ActivationsInHostMemory
from lightning_memtrain.planning.fit.techniques.loop_step import StepsInALoop
from lightning_memtrain.planning.fit.techniques.small_state import StateIn8Bits
from lightning_memtrain.planning.fit.techniques.sparse_weights import FewWeights
from lightning_memtrain.planning.fit.techniques.steps_in_backward import StepsInBackward
from lightning_memtrain.planning.fit.techniques.switch import Switch
from lightning_memtrain.planning.fit.techniques.two_byte_numbers import ComputesInBfloat16, WeightsInBfloat16

#: Costs nothing, so that it is switched on before anything else is looked at.
FREE = GradientsFreedEarly()

#: All else that a plan may switch on, those that leave the result as it is first.
SWITCHES: tuple[Switch, ...] = (
    StepsInBackward(),
    StepsInALoop(),
    ActivationsInHostMemory(),
    ComputesInBfloat16(),
    WeightsInBfloat16(),
    StateIn8Bits(),
    ActivationsIn8Bits(),
    ActivationsIn4Bits(),
    FewWeights(),
)

__all__ = ["FREE", "SWITCHES", "Switch"]
