"""The fourth held-out half: other families again, smaller, most of them of full batches."""
