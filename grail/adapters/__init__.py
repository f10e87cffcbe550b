"""Adapters for other libraries' calibration loops, one file a library; import the one you need.

Each needs its library, which this package does not install, and checks the version when it is
imported. `grail.adapters.loops` needs none.
"""

__all__ = ()
