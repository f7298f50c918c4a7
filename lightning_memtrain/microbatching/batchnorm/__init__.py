"""What batch normalisation, which looks across samples, does about chunks."""
