"""Activations that are kept for backward in few bits: what is packed, how it is quantized, and when."""
