"""What all sections of the configuration have in common."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all sections: unknown keys are errors and a loaded config never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def changes(self, name: str) -> bool:
        """Whether a setting differs from its default.

        By value, not by `model_fields_set`: the saved config.yaml spells out every default.
        """
        return bool(getattr(self, name) != type(self).model_fields[name].default)
