"""Side room: what evaluate.py does. Only `asking.py` and `samples.py` load torch."""
