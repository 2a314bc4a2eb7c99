"""From text to batches: sources, the token store, the order of windows, the input pipeline."""
