"""Write a run for TensorBoard: panels and texts for a stock TensorBoard, and records for the NFI tab."""

from typing import TYPE_CHECKING, Any

from nfi_monitor import _moved
from nfi_monitor.report.tensorboard.sink import TensorBoardSink, available, layout
from nfi_monitor.report.tensorboard.texts import alert_markdown

__all__ = ["TensorBoardSink", "alert_markdown", "available", "layout"]


if not TYPE_CHECKING:  # for a type checker, any name would exist

    def __getattr__(name: str) -> Any:
        return _moved.left(__name__, name)
