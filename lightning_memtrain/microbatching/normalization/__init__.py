"""Normalisation that does not look across samples, so that microbatches of any size are exact."""
