"""The replay of a training step, with tensors that have a size and a lifetime but no values."""
