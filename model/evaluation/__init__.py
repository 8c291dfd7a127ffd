"""Side room: the work of evaluate.py. Only `asking.py` and `samples.py` load torch."""
