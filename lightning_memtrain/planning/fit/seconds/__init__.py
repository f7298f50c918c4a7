"""How long operators take: measured on this machine, or told by what a GPU's data sheet says."""
