"""Pictures of a run. matplotlib is imported only when one is drawn."""
