"""What all sections of the configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all sections: unknown keys are errors and a loaded config never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
