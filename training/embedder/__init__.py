"""Contrastive training of small open_clip models, the embedders that stand before the reranker."""
