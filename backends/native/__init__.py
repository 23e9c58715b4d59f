"""Shift-add kernels in C++: a library without dependencies, its layout of weights, and its use from Python."""
