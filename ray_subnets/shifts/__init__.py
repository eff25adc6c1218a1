"""Test data that is not as the training data was: corrupted images, other data sets."""
