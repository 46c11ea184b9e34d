"""Groups of neurons made smaller, and what makes up for the loss."""
