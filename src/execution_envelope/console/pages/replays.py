"""Results of replaying a policy over what was recorded: what it would have changed, for whom."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter

router: Final = APIRouter(include_in_schema=False)
