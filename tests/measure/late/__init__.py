"""Tests of measuring on an accelerator; the tensors are the host's."""


def unexpected(part: str, error: BaseException) -> None:
    """Raise an error that the monitor would report."""
    raise error
