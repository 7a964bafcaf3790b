"""Experiments, one a file: `python -m train configs/<family>_<model>_<data>.py`."""
