"""Side room: what `--dry_run` prints, computed without loading a weight."""
