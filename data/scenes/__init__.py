"""The rendered scenes: coloured shapes, drawn on the spot, with captions that differ in word order alone."""
