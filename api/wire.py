"""What every request and every answer has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """Base of what clients send: unknown keys are refused, and so is text where a number belongs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True)


class Reply(BaseModel):
    """Base of what they are answered. What stands below a field is in the specification as well."""

    model_config = ConfigDict(use_attribute_docstrings=True)
