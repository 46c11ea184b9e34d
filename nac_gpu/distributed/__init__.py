"""Several processes that compress one model together."""
