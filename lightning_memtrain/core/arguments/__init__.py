"""What users pass: sizes, modules, counts, and the one error for what is wrong with them."""
