"""What a run will need, before it runs."""

from lightning_memtrain.planning.predict import predict
from lightning_memtrain.planning.prediction import Prediction
from lightning_memtrain.tracing.device import Device

__all__ = ["Device", "Prediction", "predict"]
