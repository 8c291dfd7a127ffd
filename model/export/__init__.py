"""Side room: a checkpoint as a folder that other programs load, see `export.py`."""
