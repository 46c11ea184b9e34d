"""Ward's method and other ways to cluster points. Nothing here depends on neural networks."""
