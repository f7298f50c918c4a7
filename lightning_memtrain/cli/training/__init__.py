"""What surrounds the training of a recipe: LightningCLI, signals, checkpoints, ``metrics.csv``."""
