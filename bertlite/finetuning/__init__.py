"""Tasks on top of the encoder."""
