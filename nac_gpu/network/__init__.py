"""What holds for any torch.nn.Module: running, copying, comparing, counting and timing it; knows nothing of groups."""
