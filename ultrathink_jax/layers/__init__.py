"""The mixers a model is spelled with, and the projections and norms they are made of."""
