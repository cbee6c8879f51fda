"""The exception tree of everything that knows neurons. Imports nothing.

NeuronTuneError
├── LevelError              a safety level or threshold that cannot be applied
├── MaskError
│   ├── MaskFileError       not a readable mask file: missing, truncated, not safetensors
│   ├── MaskFormatError     a safetensors file whose contents are not a valid mask
│   └── MaskMismatchError   a valid mask that was made for another model
├── ModelError              a model that cannot be loaded or served
│   └── UnsupportedModelError   a model family without an entry in the table of sites
├── ModulationError         the modulation could not be put in force; never serve on
├── DataError               data, or an option of what reads them, that cannot be used
├── ScoresError             a scores file that cannot be used, or that was made for another model
├── ExportError             a level that cannot be exported, or a folder that cannot be written
├── CheckpointError         an interrupted run that cannot be gone on with
└── RemoteError             a server that is asked over HTTP and does not answer as it should
"""


class NeuronTuneError(Exception):
    """Base of every error that this project raises on purpose. Its text is fit for users."""


class LevelError(NeuronTuneError):
    """A safety level is unknown, malformed or larger than the mask."""


class MaskError(NeuronTuneError):
    """A mask file cannot be used."""


class MaskFileError(MaskError):
    """The file is missing, truncated or not in the safetensors format."""


class MaskFormatError(MaskError):
    """The file is safetensors, but what is in it is not a valid mask."""


class MaskMismatchError(MaskError):
    """The mask is valid, but it was made for another model."""


class UnsafeMaskError(MaskError):
    """The mask's own recorded evaluation says that one of its levels is less safe than its name promises."""


class ModelError(NeuronTuneError):
    """A model cannot be loaded or served."""


class UnsupportedModelError(ModelError):
    """Nothing is known about where this model family keeps its MLP neurons."""


class ModulationError(NeuronTuneError):
    """The modulation could not be put in force. Whoever sees this must not serve on."""


class DataError(NeuronTuneError):
    """Data for evaluation, attribution or tuning, or an option of what reads them, cannot be used."""


class ScoresError(NeuronTuneError):
    """A scores file is missing or malformed, or it was made for another model."""


class CheckpointError(NeuronTuneError):
    """A checkpoint is damaged, or it belongs to another run than the one that found it."""


class ExportError(NeuronTuneError):
    """A level cannot be exported from this model, or the folder for it cannot be written."""


class RemoteError(NeuronTuneError):
    """A server that is asked over HTTP cannot be reached, refuses, or answers something else."""
