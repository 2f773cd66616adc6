"""`hf-rlhf env`: prints versions and devices for a bug report, without paths and without names of user or machine."""

import argparse
import os
import platform
from collections.abc import Sequence

from ..compat import versions
from ..errors import refuse_words
from .requirements import missing_optional_packages, unmet_requirements


def environment() -> list[tuple[str, str]]:
    """Lines of the report: name and value."""
    lines = list(versions().items())  # first, because they matter most
    # Not `platform.platform()`: the version of a self-built kernel may contain a name.
    libc = " ".join(platform.libc_ver())
    lines.append(("platform", f"{platform.system()} {platform.machine()}, {platform.python_implementation()}, {libc}"))
    lines += _torch_lines()
    for requirement in unmet_requirements():
        lines.append(("missing", f"{requirement}: pip install '{requirement}'"))
    for package in missing_optional_packages():
        lines.append(("not installed", f"{package.module} ({package.purpose}): {package.install}"))
    return lines


def _torch_lines() -> list[tuple[str, str]]:
    """How torch was built, which devices it finds, and the dtype in which models are loaded by default."""
    try:
        import torch

        from ..modeling.loading import preferred_dtype
    except Exception as error:  # a broken installation must be reported too
        return [("torch", f"cannot be imported ({type(error).__name__})")]
    # CPU, CUDA and ROCm builds may have the same version number.
    build = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if torch.version.hip:
        build = f"{torch.__version__}, ROCm {torch.version.hip}"
    lines = [("torch build", build), ("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    if not torch.accelerator.is_available():
        lines.append(("accelerator", "none"))
    else:
        for index in range(torch.accelerator.device_count()):
            lines.append((f"accelerator {index}", _device(index)))
    lines.append(("preferred dtype", str(preferred_dtype()).removeprefix("torch.")))
    return lines


def _device(index: int) -> str:
    import torch

    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":  # also the name of ROCm's devices
        return kind
    device = torch.cuda.get_device_properties(index)
    return f"{device.name}, {device.total_memory / 2**30:.1f} GiB"


def make_parser() -> argparse.ArgumentParser:
    """The options of `hf-rlhf env`: only --help."""
    return argparse.ArgumentParser(prog="hf-rlhf env", description="Prints versions and devices for a bug report.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    parser.error = refuse_words
    parser.parse_args(argv)
    print("```text")
    for name, value in environment():
        print(f"{name}: {value}")
    print("```")
