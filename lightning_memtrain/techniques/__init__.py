"""Techniques that make training need less memory; each works alone, and none imports another."""
