"""The report of a compression, measured on both models: as an HTML page, as text, as JSON."""
