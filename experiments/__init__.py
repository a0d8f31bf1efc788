"""The programs that make claims. `run.py` is the way in, README.md the list of questions they answer."""
