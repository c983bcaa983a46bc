"""Numbers in messages."""


def counted(number: float, noun: str) -> str:
    """`1 epoch`, `2 epochs`, `0.5 epochs`."""
    return f"{number:g} {noun}" if number == 1 else f"{number:.12g} {noun}s"


def weight_count(number: int) -> str:
    """`86.0 M weights`, or `1.3 k weights` for a small layer."""
    return f"{number / 1e6:.1f} M weights" if number >= 1e5 else f"{number / 1e3:.1f} k weights"
