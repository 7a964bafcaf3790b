"""Floor 0: types, dtype promotion, logical axis names, initialisers and safe mathematics."""
