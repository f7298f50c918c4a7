"""How a segment of module calls runs again in backward, with all the state that its forward found."""
