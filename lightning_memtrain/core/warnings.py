"""Warnings of this library, each a class of its own so that users can filter it."""


class NoEffectWarning(UserWarning):
    """A technique or option was asked for and matched nothing."""


class ReportWarning(UserWarning):
    """A memory report could not be written or logged; training goes on."""
