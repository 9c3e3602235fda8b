"""Data: tasks, readers, encoding and batches."""
