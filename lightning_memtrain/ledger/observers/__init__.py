"""What a ledger sees: operators, module calls, saved tensors, resized storages, compiled graphs."""
