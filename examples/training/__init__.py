"""The one training loop and what it needs: schedules, checkpoints, the run's folder."""
