"""Side room: models and runs that are larger than one GPU."""
