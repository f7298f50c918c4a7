"""Weights in half precision: converting a model, layers and buffers that stay in float32, and errors."""
