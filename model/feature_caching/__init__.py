"""Side room: `--feature_cache`, filled before the first step."""
