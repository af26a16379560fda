"""What this code needs, checked before anything is imported that an older release does not have."""

import torch
import transformers
from packaging.version import Version


# The lower ends of pyproject.toml's ranges: without the package, nothing else says them.
MINIMUM = {"transformers": "5.17", "torch": "2.11"}
INSTALLED = {"transformers": transformers.__version__, "torch": torch.__version__}


def too_old(installed: str, minimum: str) -> bool:
    """
    Whether a version lies before the release that is needed. A preview of that release counts as the release, which
    is what vendors' own builds of torch call themselves, and a local part such as `+cpu` counts for nothing.
    """
    return Version(Version(str(installed)).base_version) < Version(minimum)


for _name, _minimum in MINIMUM.items():
    if too_old(INSTALLED[_name], _minimum):
        raise ImportError(
            f"This model needs {_name} {_minimum} or newer, and {INSTALLED[_name]} is installed. "
            f"Run `pip install --upgrade '{_name}>={_minimum}'` and start again."
        )
