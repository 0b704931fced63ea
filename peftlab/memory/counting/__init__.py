"""The first room: the tensors of a model and of a method. Counting parameters needs no more."""
