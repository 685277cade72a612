"""Analyses of a trained crosscoder: one question a file, each as batch -> sums, merge, table."""
