"""WRN-28-2 on CIFAR-10: the wide residual network of the low-memory training report, with its data."""
