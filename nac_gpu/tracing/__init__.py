"""One recorded forward pass, and the groups of neurons that follow from it."""
