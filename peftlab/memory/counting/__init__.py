"""The tensors of a model and of a method. Counting parameters needs only these."""
