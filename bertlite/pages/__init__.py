"""Pages that show a run: one HTML file each, which needs no network."""
