"""Which dtypes are half precisions."""

from __future__ import annotations

import torch

#: Dtypes of 2 bytes, in which weights can be kept.
HALF_DTYPES = (torch.bfloat16, torch.float16)
