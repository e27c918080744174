"""What every other package stands on: errors, files, randomness, logging, devices and ranks."""
