"""Token ids of a config as engines take them."""


def first_id(value: int | list[int] | None) -> int | None:
    """Of one id or several."""
    return (value[0] if value else None) if isinstance(value, (list, tuple)) else value
