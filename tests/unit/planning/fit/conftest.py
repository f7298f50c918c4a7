"""What tests of plans share."""

from tests.helpers.stand_in_search import stand_in

__all__ = ["stand_in"]
