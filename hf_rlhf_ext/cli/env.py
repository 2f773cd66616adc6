"""`hf-rlhf env`: what a bug report needs, as a block of Markdown. No path and no name of a user or machine is in it."""

import argparse
import os
import platform
from collections.abc import Sequence

from ..compat import versions
from .requirements import missing_optional_packages, unmet_requirements


def environment() -> list[tuple[str, str]]:
    """Lines of the report: what, and how it is here."""
    lines = list(versions().items())  # first: what is asked for most
    # Not `platform.platform()`: the release of a kernel that someone built may hold a name.
    libc = " ".join(platform.libc_ver())
    lines.append(("platform", f"{platform.system()} {platform.machine()}, {platform.python_implementation()}, {libc}"))
    lines += _torch_lines()
    for requirement in unmet_requirements():
        lines.append(("missing", f"{requirement}: pip install '{requirement}'"))
    for package in missing_optional_packages():
        lines.append(("not installed", f"{package.module} ({package.purpose}): {package.install}"))
    return lines


def _torch_lines() -> list[tuple[str, str]]:
    """How torch was built, on which devices it runs, and in which dtype models are loaded here."""
    try:
        import torch

        from ..modeling.loading import preferred_dtype
    except Exception as error:  # a report about an installation that is broken must still be printed
        return [("torch", f"cannot be imported ({type(error).__name__})")]
    # Which torch it is says more than its version: CPU builds and ROCm builds have the same number.
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
    if kind != "cuda":  # which is also what ROCm's devices are called
        return kind
    device = torch.cuda.get_device_properties(index)
    return f"{device.name}, {device.total_memory / 2**30:.1f} GiB"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hf-rlhf env", description="Prints versions and devices for a bug report.")
    parser.parse_args(argv)
    print("```text")
    for name, value in environment():
        print(f"{name}: {value}")
    print("```")
