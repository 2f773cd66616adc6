"""Shared fixtures: real tiny models and tokenizers, and the shared data where it is present."""

import gc
import os
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run. To search for new ones: HYPOTHESIS_PROFILE=explore make test-fast.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported. Tensors are tiny here: a second OpenMP thread gains nothing, and threads of several workers
# spin against each other (PPO on a 4-bit base took four times as long with two threads).
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config, items):
    """In an xdist worker: groups first, then slow tests: no worker starts a long one when the others are done."""
    if hasattr(config, "workerinput"):  # WORKERS=0: everything in the order of the files
        items.sort(key=_rank)  # stable


def _rank(item) -> tuple[int, str]:
    group = item.get_closest_marker("xdist_group")
    if group is not None:
        return 0, group.args[0]
    if item.get_closest_marker("slow") is not None:
        return 1, ""
    return 2, ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadgroup` with groups of whole files: pytest-xdist 3.8 sees no mark under pytest 9.2 (its issue 1386).

    A group runs on one worker, file after file. Files of the group `processes` build the wheel or start several
    processes, or processes that are timed or killed; `recipes` share three trained models.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class LoadGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(config.rootpath / nodeid.split("::")[0]) or nodeid

    return LoadGroups(config, log)


@cache
def _group_of(path: Path) -> str | None:
    """The group that a test file's `pytestmark` names."""
    mark = re.search(r'^pytestmark = .*xdist_group\("(\w+)"\)', path.read_text(encoding="utf-8"), re.MULTILINE)
    return None if mark is None else mark[1]


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts with the same random state, whichever tests its worker ran before."""
    random.seed(0)
    for name in ("numpy", "torch"):
        module = sys.modules.get(name)  # not imported for the sake of tests that do without
        if module is None:
            continue
        if name == "torch":
            module.manual_seed(0)
        else:
            module.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def _fast_garbage_collection():
    """`Trainer` collects garbage in every training, and would walk through all imported modules each time."""
    gc.collect()
    gc.freeze()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _shared() -> Path:
    shared = Path(os.environ.get("RLHF_SHARED", Path(__file__).parents[1].parent / "shared"))
    if not (shared / "data").is_dir():
        reason = "no shared data folder: set RLHF_SHARED to it"
        if os.environ.get("RLHF_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return shared


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets, used in place and never copied into the project."""
    return _shared() / "data"


@pytest.fixture(scope="session")
def stories_path() -> Path:
    """A 260,000-parameter Llama that really tells stories."""
    return _shared() / "models" / "stories260K"


@pytest.fixture(scope="session")
def recipes_path() -> Path:
    return Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="session")
def chat_tokenizer_factory():
    """Makes a real byte-level BPE tokenizer with a ChatML template, eos `<|im_end|>` and a pad token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [
        "You are a helpful assistant. user system assistant",
        "Tell me about a sunny day in the garden, and what makes people happy or sad there.",
        "The quick brown fox jumps over the lazy dog; numbers 0123456789 and words, many words!",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def make():
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", padding_side="left"
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    return make


@pytest.fixture
def chat_tokenizer(chat_tokenizer_factory):
    return chat_tokenizer_factory()


@pytest.fixture
def tiny_config(chat_tokenizer):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(chat_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=chat_tokenizer.eos_token_id,
        pad_token_id=chat_tokenizer.pad_token_id,
        bos_token_id=None,
    )


@pytest.fixture
def tiny_llama(tiny_config):
    """A random two-layer LlamaForCausalLM in fp32, the same weights every time."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built with this environment's setuptools from a copy (a build writes into its source folder)."""
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    # tests too: the build must leave them out by itself
    for name in (
        "setup.cfg",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "hf_rlhf_ext",
        "recipes",
        "tests",
        "model_cards",
    ):
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).is_file():
            shutil.copyfile(root / name, folder / "source" / name)
    _pip("wheel", "--no-build-isolation", "-w", str(folder), "./source", cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    _pip("install", "--target", str(target), str(wheel), cwd=target)
    return target


def _pip(command: str, *args: str, cwd: Path) -> None:
    words = [sys.executable, "-m", "pip", command, "-q", "--no-deps", "--no-index", *args]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def script(monkeypatch):
    """Imports a script of benchmarks/ as it imports the others."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module
