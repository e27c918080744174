"""Masked language modelling, from text to a run folder."""
