"""Draw the whole gallery: ``python -m figures``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from figures.data import SCRIPTS

GALLERY = Path(__file__).parent / "gallery"


def main() -> None:
    """Draw every figure into ``figures/gallery``."""
    GALLERY.mkdir(exist_ok=True)
    for name in SCRIPTS:
        path = GALLERY / f"{name}.png"
        import_module(f"figures.{name}").draw().savefig(path, dpi=200)
        print(path)


if __name__ == "__main__":
    main()
