"""What every program does around its task."""
