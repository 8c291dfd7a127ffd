"""Side room: models that are larger than one GPU, or than the memory at hand."""
