"""For TensorBoard: panels and texts that a stock TensorBoard shows, and the records that the NFI tab reads."""

from nfi_monitor.report.tensorboard.sink import TensorBoardSink, alert_markdown, available, layout

__all__ = ["TensorBoardSink", "alert_markdown", "available", "layout"]
