"""Equivalent transforms: where scales can move between weights without changing the function, and how to fold them."""
