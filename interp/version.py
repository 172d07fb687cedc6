"""The version of the package, which its metadata is made from."""

__version__ = "0.1.0"
