"""Kernels and profiling for compressed language models; usable without ctp_cli. Imports nothing by itself."""
