"""What the sections of the YAML consist of: strict models, and types with their limits."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    """One section of the YAML. Unknown keys and wrong types are errors; values never change."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(gt=0, le=1 << 24)]  # the bytes of a matrix with two such sides can be counted in 64 bits
Depth = Annotated[int, Field(gt=0, le=10_000)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # a file, a folder, or a hub name
