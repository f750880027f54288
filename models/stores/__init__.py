"""Token stores: writing and reading them, their format, the codecs of their dtypes, and indexing images."""
