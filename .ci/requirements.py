"""Prints the project's requirements and those of the named extras, for pip."""

import sys
from pathlib import Path

from pip._vendor.packaging.markers import Marker

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pip brings its own copy
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
kept = []
for requirement in wanted:
    # What a shell splits into words may hold no spaces, as a condition does.
    name, _, condition = requirement.partition(";")
    if not condition or Marker(condition.strip()).evaluate():
        kept.append(name.strip())
print(" ".join(dict.fromkeys(kept)))
