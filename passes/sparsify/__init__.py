"""Choosing which weights stay: patterns, scores, and the loops that make up for what goes."""
