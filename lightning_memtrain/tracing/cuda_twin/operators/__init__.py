"""How operators differ on CUDA: kernels of attention, types under autocast, what they need besides."""
