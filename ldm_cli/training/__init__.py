"""The one loop of all trainers: loop, optimizer, EMA, checkpoints. It knows no model and no data set."""
