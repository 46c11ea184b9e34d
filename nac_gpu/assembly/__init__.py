"""Merging groups of neurons, and reducing the error that it causes."""
