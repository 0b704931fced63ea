"""The second room: a training step, lived through with tensors that have a size and a life but no values."""
