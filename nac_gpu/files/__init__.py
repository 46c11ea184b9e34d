"""Models as files: saved, loaded, left in their files, exported."""
