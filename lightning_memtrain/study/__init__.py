"""Many runs of a recipe as one study: what is run, what came of it, and figures of it."""
