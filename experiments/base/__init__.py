"""What all experiments stand on: data, networks, training, measuring, a cache, figures.

Imports point one way: pools and networks know nobody, training and volumes know them, the
laboratory knows all of these, and an experiment knows the laboratory and the figures.
"""
