"""For griffe: the default of a dataclass's field is what `setting(default, …)` is given first."""

import griffe


class Settings(griffe.Extension):
    """Shows `epochs: int = 200`, not `epochs: int = setting(200, least=1)`."""

    def on_attribute(self, *, attr, **_):
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "setting":
            attr.value = value.arguments[0]
