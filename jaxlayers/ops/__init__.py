"""Floor 1: array operations without parameters: windows, patches, resampling."""
