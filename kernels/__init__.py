"""Kernels, by device."""

# Installed, this is mst_compile.kernels. In the repository's root Python also finds it as "kernels", the name of a
# package of Hugging Face's: transformers asks for that one's version and then imports from what has the name, which
# bitsandbytes does as well. So under that name it makes way for the package, or is of a version that is nobody's.
import os

if __name__ == "kernels":
    import importlib.util
    import sys
    from importlib.machinery import PathFinder

    _root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _spec = PathFinder.find_spec(__name__, [path for path in sys.path if os.path.realpath(path) != _root])
    if _spec is None or _spec.loader is None or not _spec.has_location:
        __version__ = "0"
    else:
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[__name__] = _module  # what import returns
        _spec.loader.exec_module(_module)
elif not os.path.isdir(os.path.join(os.path.dirname(__file__), "cpu")):
    from mst_compile.errors import MissingPackageError

    raise MissingPackageError(
        f"mst_compile lies in an archive ({__file__}), and its kernels are files that compilers read: install it into "
        "a folder (pex --venv or an unzipped pex, no zipimport)"
    )
