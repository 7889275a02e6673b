"""Implementations of the operators, one folder each; none imports another."""
