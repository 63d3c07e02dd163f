"""Kubernetes-style quantities, as strings outside and integers in base units inside.

CPU is counted in milli-cores (`"500m"` is 500), memory in bytes (`"256Mi"` is 268435456).
"""

import re
from decimal import Decimal, InvalidOperation

MIB = 1024**2
GIB = 1024**3

_CPU = re.compile(r"([0-9]+(?:\.[0-9]+)?)([num]?)")
_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(Ki|Mi|Gi|KiB|MiB|GiB)")
_CPU_SCALE = {"n": Decimal("0.000001"), "u": Decimal("0.001"), "m": Decimal(1), "": Decimal(1000)}
_MEMORY_SCALE = {"K": 1024, "M": MIB, "G": GIB}
_MAX = 2**53 - 1


def cpu_millis(text: str) -> int:
    """`"500m"`, `"2"` or `"0.5"` as milli-cores, more than 0; what is smaller than one milli-core is refused."""
    match = _CPU.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a CPU quantity such as `500m` or `2`, got `{text}`")
    return _whole(Decimal(match[1]) * _CPU_SCALE[match[2]], text)


def memory_bytes(text: str) -> int:
    """`"256Mi"`, `"256MiB"` or `"1.5Gi"` as bytes, more than 0."""
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a memory quantity such as `256Mi` or `1Gi`, got `{text}`")
    return _whole(Decimal(match[1]) * _MEMORY_SCALE[match[2][0]], text)


def mebibytes(amount: int) -> str:
    """Bytes as an exact `Mi` quantity, the form the SDK's response models accept: 268435456 is `"256Mi"`."""
    return f"{(Decimal(amount) / MIB).normalize():f}Mi"


def in_words(amount: int) -> str:
    """Bytes for a sentence, rounded to a whole MiB: `"256 MiB"`."""
    return f"{amount / MIB:.0f} MiB"


def _whole(amount: Decimal, text: str) -> int:
    try:
        whole = int(amount)
    except InvalidOperation as error:
        raise ValueError(f"expected a quantity in range, got `{text}`") from error
    if whole != amount or not 0 < whole <= _MAX:
        raise ValueError(f"expected a positive whole number of base units, got `{text}`")
    return whole
