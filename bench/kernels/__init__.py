"""Time, accuracy and memory of the kernels, and of one site's ridge and absorb."""
