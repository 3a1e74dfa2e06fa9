"""Networks as plain modules; in each file its Config first, then the module."""
