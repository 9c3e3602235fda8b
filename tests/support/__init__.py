"""What the tests share: tiny models, whole runs, processes, a hub, paths."""
