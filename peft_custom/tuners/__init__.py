"""Tuners: one folder per method, its names handed on by an import line in `peft_custom`."""
