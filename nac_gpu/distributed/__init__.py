"""Compression of one model by several processes together."""
