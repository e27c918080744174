"""Models for other programs, and the proof that they are equal."""
