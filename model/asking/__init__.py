"""Side room: everything that test.py does beyond one question."""
