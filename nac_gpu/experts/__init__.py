"""Merging the experts of mixtures of experts, on request."""
