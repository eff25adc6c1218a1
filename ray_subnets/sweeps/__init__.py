"""Grids and searches over any setting, the trust region, and what a person sees of them."""
