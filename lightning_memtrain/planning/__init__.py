"""What a run will need, before it runs, and what makes it fit."""

from lightning_memtrain.planning.fit.make_plan import plan
from lightning_memtrain.planning.fit.plan import Plan
from lightning_memtrain.planning.fit.running.fit_memory import FitMemory
from lightning_memtrain.planning.fit.techniques import Switch
from lightning_memtrain.planning.fit.way import TechniqueSettings, Way
from lightning_memtrain.planning.prediction.predict import predict
from lightning_memtrain.planning.prediction.prediction import Prediction
from lightning_memtrain.tracing.device import Device

__all__ = [
    "Device",
    "FitMemory",
    "Plan",
    "Prediction",
    "Switch",
    "TechniqueSettings",
    "Way",
    "plan",
    "predict",
]
