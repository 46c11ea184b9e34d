"""Tools for any torch.nn.Module: run, copy, compare, count and time it. Nothing here depends on groups of neurons."""
