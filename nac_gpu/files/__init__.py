"""Models as files: saving, loading, opening without loading, exporting."""
