"""Training: methods, data, strict configuration, checkpoints that are whole or not there."""
