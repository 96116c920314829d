"""Sampling of directions by their weight: Markov moves, tempering, and what their states tell.

``field.py`` evaluates rays, ``moves.py`` moves them, ``tempering.py`` carries a population from
isotropic directions to those that hold the volume, ``bridge.py`` turns all states into log
volumes.
"""
