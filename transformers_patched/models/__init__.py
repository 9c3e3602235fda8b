"""Models to edit: one readable file per model."""
