"""Outputs of the original packages, the programs that wrote them, and the cases that they ran."""
