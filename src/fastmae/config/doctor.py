"""Options of `fastmae doctor`."""

from fastmae.config.common import Common
from fastmae.config.options import options


@options
class DoctorConfig(Common):
    """Look at this machine and installation: versions, devices, memory, extras, and what to change. Nothing is run."""
