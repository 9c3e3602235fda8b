"""Tuners: one folder per method."""
