"""The forms of a training step that are compared and measured.

Every field is written out, so that a change of the trainer's defaults does not change what a name here means.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from trainer.model.speed import Speed

_PLAIN: Final = Speed(
    amp="off", channels_last=False, compile=False, cuda_graphs=False, fused_norm=False, fused_sgd=False
)


def _bf16(**on: Any) -> Speed:
    return msgspec.structs.replace(_PLAIN, amp="bf16", channels_last=True, fused_sgd=True, **on)


PLAIN: Final = "float32, plain"
FORMS: Final[dict[str, Speed]] = {
    PLAIN: _PLAIN,
    "float32, channels-last": msgspec.structs.replace(_PLAIN, channels_last=True),
    "float32, fused SGD": msgspec.structs.replace(_PLAIN, fused_sgd=True),
    "float32, fused LRN": msgspec.structs.replace(_PLAIN, fused_norm=True),
    "float32, graphs": msgspec.structs.replace(_PLAIN, cuda_graphs=True),
    "float32, compiled": msgspec.structs.replace(_PLAIN, compile=True),
    "bf16": _bf16(),
    "bf16, fused LRN": _bf16(fused_norm=True),
    "bf16, graphs": _bf16(cuda_graphs=True),
    "bf16, fused LRN, graphs": _bf16(fused_norm=True, cuda_graphs=True),
    "bf16, compiled": _bf16(compile=True),
    "bf16, fused LRN, compiled, graphs": _bf16(fused_norm=True, compile=True, cuda_graphs=True),
}
"""Each option alone in float32; with bfloat16, channels-last maps and fused SGD, the combinations that should be fast."""

SAFE: Final = "bf16"
"""The form that feeds and trains while no other one has been measured."""

DRY: Final = (PLAIN, "float32, fused LRN", "bf16")
"""Forms of a dry run: those that a CPU runs within a second."""


def names(dry: bool) -> list[str]:
    """Return the names of all forms of a run."""
    return list(DRY if dry else FORMS)


def arguments(form: str) -> list[str]:
    """Return the options of ``trainer run`` for a form."""
    options = []
    for field, value in msgspec.structs.asdict(FORMS[form]).items():
        name = field.replace("_", "-")
        options += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return options
