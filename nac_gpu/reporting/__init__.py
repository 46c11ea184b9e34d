"""What a compression did, measured: as a page, as text, as JSON."""
