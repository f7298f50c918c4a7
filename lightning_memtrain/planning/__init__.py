"""What a run will need, before it runs."""

from lightning_memtrain.planning.predict import predict
from lightning_memtrain.planning.prediction import SCHEMA_VERSION, Prediction
from lightning_memtrain.tracing.device import Device

__all__ = ["SCHEMA_VERSION", "Device", "Prediction", "predict"]
