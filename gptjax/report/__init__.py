"""What happened in runs: their files read without JAX, and a page that shows them."""
