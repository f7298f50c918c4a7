"""One training step run without data, with some techniques: what it holds, and what it runs."""
