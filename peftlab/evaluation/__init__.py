"""What answers are worth, and how sure one can be of it: scores, intervals, tests of differences, judges.

Nothing here loads a model, and nothing needs torch. What runs a model is in `peftlab.training.metrics`.
"""
