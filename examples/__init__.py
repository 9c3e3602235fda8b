"""Programs: one runner and one trainer for every method and task."""
