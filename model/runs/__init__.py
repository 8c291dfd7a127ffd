"""Side room: stopping, resuming and watching a run."""
