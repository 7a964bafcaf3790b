"""The trainer: one frozen `Config`, one loop, any device mesh. Start it with `python -m train CONFIG`.

Nothing is imported here: `python -m train --devices N` must set the platform before JAX is loaded.
"""
