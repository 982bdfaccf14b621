"""Every mistake a user can make ends in one of these: one sentence, what was wrong and what to do."""


class LdmError(ValueError):
    """Base of all errors that ldm raises on purpose. The message is one printable line."""


class CheckpointError(LdmError):
    """A weight file is damaged, hostile, incomplete or not what it was taken for."""


class PromptError(LdmError):
    """A prompt cannot be encoded."""


class RequestError(LdmError):
    """A setting of a picture is out of range or does not fit the model."""


class SamplerError(LdmError):
    """An unknown sampler or schedule, or an option that a sampler does not have."""


class NotFiniteError(LdmError):
    """A network gave NaN or infinity."""


def check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raise RequestError if a setting is out of its range; None is no value, and NaN is in no range."""
    if value is not None and not low <= value <= high:
        raise RequestError(f"{name} must be {low} to {high}, got {str(value)[:40]}")
