"""Benchmarks of fastvol: against what is done by hand, of its own loop, and of its C++ core."""
