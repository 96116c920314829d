"""What the field has found about large minima and data, to repeat, change and extend.

One folder a question: ``python -m experiments`` lists them, with a name it runs one.
"""

from __future__ import annotations

# In the order in which the README tells them.
NAMES = (
    "poisoned",
    "largest",
    "data_shrinks",
    "scaling_law",
    "exceptions",
    "how_many_directions",
    "overall_volume",
    "optimizers",
    "slices",
    "language",
)
