"""Python objects within reach of a module call: what they hold, and copies of them to run on again."""
