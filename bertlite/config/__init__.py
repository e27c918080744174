"""The YAML: settings and how they are read."""
