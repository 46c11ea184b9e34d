"""Ward's method and other ways to cluster points; knows nothing of networks."""
