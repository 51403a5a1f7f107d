"""Libraries that cannot be installed beside the pinned torch on a CPU."""

from __future__ import annotations

from tests.zoo.configuration import Table

TABLES = (
    Table("composer", ("mosaicml",), list, reason="mosaicml 0.32.1 needs torch < 2.8"),
    Table(
        "torchtune",
        ("torchtune",),
        list,
        reason="torchtune 0.6.1 imports torchao.dtypes.nf4tensor, which torchao 0.18 lacks",
    ),
    Table("unsloth", ("unsloth",), list, reason="needs a GPU"),
    Table("bitsandbytes", ("bitsandbytes",), list, reason="its optimizers need a GPU"),
)
