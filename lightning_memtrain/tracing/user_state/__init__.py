"""All Python state that a step can touch, captured and set back in place."""
