"""Variants times seeds at equal budget, and the quick start, the smallest of them."""
