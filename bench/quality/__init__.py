"""Quality and time of whole compressions of real networks."""
