"""How a sparse weight is kept and computed with."""
