"""Kernels for processors, written in C++ and compiled at first use. Imports nothing by itself."""
