"""Fewer experts in mixtures of experts, on request."""
