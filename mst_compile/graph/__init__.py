"""The Dynamo backend and its graph passes, one file each."""

import warnings

with warnings.catch_warnings():  # that of PyTorch's own, at which Inductor cannot be imported under ``-W error``
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    import torch.utils.mkldnn  # noqa: F401
