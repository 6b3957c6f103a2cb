"""Every error that kintsugi raises on purpose. Each message is one sentence that says what to do.

KintsugiError
├── ConfigError            a setting cannot work
├── DataError              a folder, a dataset or a pair of images cannot be used
│   ├── BadRows            too many images of a published dataset are damaged
│   ├── CacheFull          a split does not fit into the local cache
│   └── ImageError         bytes that are not an image kintsugi restores; carries a stable `code`
├── IntegrityError         stored bytes differ from their manifest
├── StoreError             the object store refused or failed
│   ├── ObjectNotFound     no such key
│   ├── PreconditionFailed someone else wrote first (If-None-Match, If-Match)
│   └── StoreUnavailable   no answer; trying again may help
├── ModelNotFound          no such model, version or alias
├── Abandoned              nobody waits any more for what was being done
├── GateRefused            a model is worse than the one in production
├── TrainingError          a training run or a search did not finish
│   └── RunInterrupted     what it ran on failed; begun again, it goes on
└── StackError             the local stack, or the cluster, is not in the needed state
    └── ClusterUnreachable the cluster did not answer; trying again may help
"""


class KintsugiError(Exception):
    """Root of all errors meant for a person."""


class ConfigError(KintsugiError):
    """A setting cannot work."""


class DataError(KintsugiError):
    """A folder, a dataset or a pair of images cannot be used."""


class BadRows(DataError):
    """Too many images of a published dataset are damaged."""


class CacheFull(DataError):
    """A split does not fit into the local cache."""


class ImageError(DataError):
    """Bytes that are not an image kintsugi restores.

    `code` is one of `undecodable`, `unsupported_format`, `unsupported_mode`, `too_large`,
    `over_white_level`, `mismatch`, `mask_required`, `poison`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.code, str(self))


class IntegrityError(KintsugiError):
    """Stored bytes differ from what their manifest promises."""


class StoreError(KintsugiError):
    """The object store refused or failed."""


class ObjectNotFound(StoreError):
    """No object under that key."""


class PreconditionFailed(StoreError):
    """The object exists already, or changed since it was read."""


class StoreUnavailable(StoreError):
    """The store did not answer; trying again may help."""


class ModelNotFound(KintsugiError):
    """No such model, version or alias."""


class Abandoned(KintsugiError):
    """Work was given up because nobody waits for it any more."""


class GateRefused(KintsugiError):
    """A model is worse than the one in production, or nothing tells that it is not."""


class TrainingError(KintsugiError):
    """A training run or a search did not finish."""


class RunInterrupted(TrainingError):
    """What a training run ran on failed: processes, nodes, the cluster. Begun again, it goes on."""


class StackError(KintsugiError):
    """The local stack, or the cluster, is not in the needed state."""


class ClusterUnreachable(StackError):
    """The cluster did not answer; trying again may help."""
