"""What the experiments share: data sets as tensors, the paper's networks, one training loop, tables and plots."""
