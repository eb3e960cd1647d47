"""Whole-model benchmarks: tables and figures of latency, recovered perplexity and learning."""
