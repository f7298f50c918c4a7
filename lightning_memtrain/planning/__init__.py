"""What a run will need, before it runs."""

from lightning_memtrain.planning.prediction.predict import predict
from lightning_memtrain.planning.prediction.prediction import Prediction
from lightning_memtrain.tracing.device import Device

__all__ = ["Device", "Prediction", "predict"]
