"""Floor 1: groups, frames and decompositions as pure functions."""
