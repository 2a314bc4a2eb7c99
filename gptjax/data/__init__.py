"""Text to batches: data sources, the token store, the data order and the input pipeline."""
