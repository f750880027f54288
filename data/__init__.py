"""Data sets as images and captions, the batches that training reads, and what must not be a negative."""
