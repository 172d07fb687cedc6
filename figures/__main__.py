"""Draw the whole gallery: ``python -m figures``."""

from __future__ import annotations

from pathlib import Path

from figures import first_order, heads, residual, speed

GALLERY = Path(__file__).parent / "gallery"


def main() -> None:
    """Draw every figure into ``figures/gallery``."""
    GALLERY.mkdir(exist_ok=True)
    for script in (residual, heads, first_order, speed):
        path = GALLERY / f"{script.__name__.rpartition('.')[2]}.png"
        script.draw().savefig(path, dpi=200)
        print(path)


if __name__ == "__main__":
    main()
