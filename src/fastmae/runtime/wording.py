"""Numbers in messages."""


def counted(number: float, noun: str, plural: str = "") -> str:
    """`1 epoch`, `2 epochs`, `0.5 epochs`; the plural of `class` must be given."""
    return f"{number:g} {noun}" if number == 1 else f"{number:.12g} {plural or f'{noun}s'}"


def tells_top5(classes: int) -> bool:
    """Whether a top-5 accuracy says anything: of five classes, one of any five guesses is right."""
    return classes > 5


def accuracies(top1: float, top5: float, classes: int) -> str:
    """`top-1 41.0 %, top-5 80.5 %`; without the top-5 accuracy where it says nothing."""
    return f"top-1 {top1:.1f} %" + (f", top-5 {top5:.1f} %" if tells_top5(classes) else "")


def weight_count(number: int) -> str:
    """`86.0 M weights`, or `1.3 k weights` for a small layer."""
    return f"{number / 1e6:.1f} M weights" if number >= 1e5 else f"{number / 1e3:.1f} k weights"
