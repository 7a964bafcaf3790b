"""Floor 2: Linen blocks that two or more families use."""
