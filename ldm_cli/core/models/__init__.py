"""Networks as plain modules; the Config of each is in a file of its own, which imports no torch."""
