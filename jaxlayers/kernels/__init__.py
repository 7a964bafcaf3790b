"""Products that would not fit memory as plain ones, with gradients of their own; Pallas kernels and their twins."""
