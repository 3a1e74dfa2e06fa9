"""One file per kind of generator: how its folder is opened, fitted together and saved."""
