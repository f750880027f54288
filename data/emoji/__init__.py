"""Emoji of three artists with captions in Karpathy's layout, rebuilt from public npm packages of pinned content."""
