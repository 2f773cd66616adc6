"""Runs a script with FSDP and DeepSpeed on CPU processes: `python -m tests.engines.on_cpu SCRIPT ARGUMENTS…`.

accelerate never turns either of them on for CPUs. Two lines of its `state.py` decide that, and this module changes them
when accelerate is imported. Sharding, collectives (gloo) and checkpoints are the real ones.
"""

import runpy
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

_CHANGES = {
    "accelerate.state": {
        # FSDP: "is this a group of GPUs?", where the environment asks for it.
        """            elif self.distributed_type in [
                DistributedType.MULTI_GPU,
                DistributedType.MULTI_MLU,
""": """            elif self.distributed_type in [
                DistributedType.MULTI_CPU,
                DistributedType.MULTI_GPU,
                DistributedType.MULTI_MLU,
""",
        # DeepSpeed: the same.
        """os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and not cpu:
""": """os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
""",
    },
    # DeepSpeed compiles a C++ module at its first run on a CPU, for all-reduces in inference: it needs g++ and half a
    # minute, and training makes no use of it.
    "deepspeed.comm.torch": {"self.shm_comm_op = build_shm_op()": "self.shm_comm_op = None"},
}
"""Lines of modules that are replaced, by module: each stands there exactly once."""


class _Loader(SourceFileLoader):
    """Loads a module with the changes."""

    def get_code(self, fullname):
        source = self.get_source(fullname)
        for old, new in _CHANGES[fullname].items():
            if source.count(old) != 1:
                raise ImportError(f"{fullname} has changed, and tests/engines/on_cpu.py no longer fits: {old!r}")
            source = source.replace(old, new)
        return self.source_to_code(source.encode(), self.path)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path, target=None) -> ModuleSpec | None:
        if fullname not in _CHANGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def allow_engines() -> None:
    """Lets accelerate turn FSDP and DeepSpeed on for CPU processes. Call it before accelerate is imported."""
    for module in _CHANGES:
        if module in sys.modules:
            raise RuntimeError(f"allow_engines comes too late: {module} is imported already")
    sys.meta_path.insert(0, _Finder())


if __name__ == "__main__":
    allow_engines()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
