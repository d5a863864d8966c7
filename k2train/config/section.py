"""Base class of all config sections: frozen, typed, no unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base class of all sections: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False)
