"""What `hf-rlhf check-hub` tries: headers of cards, a base, an adapter and a data set, pushed and pulled again."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from huggingface_hub import CommitOperationAdd, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..compat import versions
from .check_parts import Check, OwnRepositories
from .dataset import push_comparisons
from .licenses import HUB_LICENSES
from .push import push_run
from .refusals import reasons_of_hub, shortened
from .report import CardOptions, RunReport, SFTSection

_OURS = ".hf_rlhf_ext.json"
_REWRITTEN = ("README.md", "adapter_config.json", "config.json", "report.json", _OURS, ".gitattributes")
"""Files that a push changes, or that only the repository has."""
_TEXT = "The sky is blue in the morning."
_RESULTS = [{"task": {"type": "text-generation"}, "dataset": {"type": "text", "name": "text"}}]
_HEADERS: list[tuple[str, dict[str, Any], bool]] = [
    ("license apache-2.0", {"license": "apache-2.0"}, True),
    ("license Apache 2.0", {"license": "Apache 2.0"}, False),
    ("license other without a name", {"license": "other"}, True),
    (
        "license other with name and link",
        {"license": "other", "license_name": "a-1.0", "license_link": "LICENSE"},
        True,
    ),
    ("several licenses", {"license": ["mit", "cc-by-4.0"]}, True),
    ("a folder as base_model", {"base_model": "/runs/base"}, False),
    ("words as base_model", {"base_model": "a small model"}, False),
    ("a folder in datasets", {"datasets": ["/data/rows"]}, False),
    ("language en", {"language": "en"}, True),
    ("language English", {"language": "English"}, False),
    ("tags that are no list", {"tags": "rlhf"}, False),
    ("a model index without results", {"model-index": [{"name": "a"}]}, False),
    ("results without metrics", {"model-index": [{"name": "a", "results": _RESULTS}]}, False),
]
"""Headers of cards, and whether the stand-in accepts them."""


def headers_of_cards(own: OwnRepositories, scratch: Path) -> Iterator[Check]:
    """Which headers the Hub accepts, and which licenses it knows. Only asks: nothing is created."""
    for what, header, accepted in _HEADERS:
        reasons = reasons_of_hub(header, token=own.token)
        if reasons is None:
            found = "no answer"
        else:
            found = "refused" if reasons else "accepted"
        yield Check(what, found, "accepted" if accepted else "refused", shortened("; ".join(reasons or ())))
    reasons = reasons_of_hub({"license": "none of them"}, token=own.token) or [""]
    listed = re.search(r"\[(.*)\]", reasons[0])
    theirs = set(listed[1].split(", ")) - {"array"} if listed else set()
    missing = sorted(theirs.symmetric_difference(HUB_LICENSES)) if theirs else ["no list"]
    yield Check("list of licenses", f"differs in {', '.join(missing)}" if missing else "the same", "the same")


def base_and_adapter(own: OwnRepositories, scratch: Path) -> Iterator[Check]:
    """A tiny base and an adapter on it: pushed with their cards, pulled and compared."""
    base_id = own.create("base")
    yield from _of_a_new_repository(own, base_id)
    _write_base(scratch / "base")
    push_run(scratch / "base", base_id, license="cc0-1.0", token=own.token)
    base_commit = str(own.api.model_info(base_id).sha)
    base = AutoModelForCausalLM.from_pretrained(
        base_id, revision=base_commit, token=own.token, cache_dir=scratch / "cache", dtype=torch.float32
    )
    adapter_id = own.create("adapter")
    outputs = _write_adapter(scratch / "adapter", base, base_id, base_commit)
    push_run(scratch / "adapter", adapter_id, token=own.token)
    yield from _of_a_push(own, adapter_id, base_id)
    yield from _of_pulled_files(own, scratch, adapter_id)
    pulled = AutoModelForCausalLM.from_pretrained(
        base_id, revision=base_commit, token=own.token, cache_dir=scratch / "cache", dtype=torch.float32
    )
    pulled = PeftModel.from_pretrained(pulled, adapter_id, token=own.token, cache_dir=scratch / "cache")
    same = torch.equal(_outputs(pulled), outputs)
    yield Check("outputs of the pulled adapter on the pulled base", "equal" if same else "not equal", "equal")
    yield from _of_further_commits(own, scratch, adapter_id)


def a_data_set(own: OwnRepositories, scratch: Path) -> Iterator[Check]:
    """Two comparisons as a data set: pushed and loaded."""
    repo_id = own.create("data", "dataset")
    row = {"prompt": "Name a blue thing.", "completions": ["The sky.", "Grass."], "pairs": [[0, 1]], "targets": [1.0]}
    rows = Dataset.from_list([row, {**row, "prompt": "Name a thing that is blue."}])
    push_comparisons(rows, repo_id, licenses={"made by hf-rlhf check-hub": "cc0-1.0"}, token=own.token)
    pulled = load_dataset(repo_id, split="train", token=own.token, cache_dir=str(scratch / "datasets"))
    same = pulled.to_list() == rows.to_list()
    yield Check("rows of a pulled data set", "equal" if same else "not equal", "equal")
    yield Check("visibility of a data set", _visibility(own, repo_id, "dataset"), "private")


STEPS = (headers_of_cards, base_and_adapter, a_data_set)


# Checks


def _of_a_new_repository(own: OwnRepositories, repo_id: str) -> Iterator[Check]:
    yield Check("visibility of a new repository", _visibility(own, repo_id), "private")
    yield Check(
        "a private repository without a token", _error_of(lambda: own.api.model_info(repo_id, token=False)), "401"
    )
    again = _error_of(lambda: own.api.create_repo(repo_id, exist_ok=False, private=True))
    yield Check("a second repository of the same name", again, "409")
    yield Check("commits of a new repository", str(len(own.api.list_repo_commits(repo_id))), "1")
    yield Check("files of a new repository", ", ".join(own.api.list_repo_files(repo_id)), ".gitattributes")


def _of_a_push(own: OwnRepositories, repo_id: str, base_id: str) -> Iterator[Check]:
    yield Check("commits of a push", str(len(own.api.list_repo_commits(repo_id)) - 1), "1")
    files = [entry for entry in own.api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile)]
    large = sorted(entry.path for entry in files if entry.lfs is not None)
    yield Check("files of an adapter in LFS", ", ".join(large), "adapter_model.safetensors")
    info = own.api.model_info(repo_id)
    tags = {tag for tag in info.tags or () if base_id in tag}
    relation = "adapter of the base" if f"base_model:adapter:{base_id}" in tags else "no adapter of the base"
    yield Check("relation to the base, from the card", relation, "adapter of the base", ", ".join(sorted(tags)))
    yield Check("task, from the card", str(info.pipeline_tag), "text-generation")
    yield Check("library, from the card", str(info.library_name), "peft")
    card = ModelCard.load(repo_id, token=own.token)
    yield Check("license of an adapter, from the card of its base", str(card.data.license), "cc0-1.0")


def _of_pulled_files(own: OwnRepositories, scratch: Path, repo_id: str) -> Iterator[Check]:
    pulled = Path(snapshot_download(repo_id, token=own.token, local_dir=scratch / "pulled"))
    names = {path.name for path in pulled.iterdir() if path.is_file()} - set(_REWRITTEN)
    differing = sorted(name for name in names if _sha256(pulled / name) != _sha256(scratch / "adapter" / name))
    found = f"not equal: {', '.join(differing)}" if differing else "equal"
    yield Check("bytes of the pulled files", found, "equal", f"{len(names)} files")


def _of_further_commits(own: OwnRepositories, scratch: Path, repo_id: str) -> Iterator[Check]:
    head = str(own.api.model_info(repo_id).sha)
    push_run(scratch / "adapter", repo_id, token=own.token)
    same = own.api.model_info(repo_id).sha == head
    yield Check("the same push again", "no commit" if same else "a commit", "no commit")
    push_run(scratch / "adapter", repo_id, revision="check", token=own.token)
    branches = sorted(branch.name for branch in own.api.list_repo_refs(repo_id).branches)
    yield Check("branches after a push to another one", ", ".join(branches), "check, main")
    first = own.api.list_repo_commits(repo_id)[-1].commit_id
    note = [CommitOperationAdd("note.txt", b"check")]
    stale = _error_of(lambda: own.api.create_commit(repo_id, note, commit_message="check", parent_commit=first))
    yield Check("a commit on an old state", stale, "412")


def _visibility(own: OwnRepositories, repo_id: str, repo_type: str = "model") -> str:
    return "private" if own.api.repo_info(repo_id, repo_type=repo_type).private else "public"


def _error_of(call: Callable[[], object]) -> str:
    """Returns the HTTP status with which the Hub refuses a request."""
    try:
        call()
    except HfHubHTTPError as error:
        return str(error.response.status_code)
    return "accepted"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"


# A base and an adapter of a few kilobytes


def _write_base(folder: Path) -> None:
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each byte."""
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def _write_adapter(folder: Path, base: torch.nn.Module, base_id: str, base_commit: str) -> torch.Tensor:
    """Writes an adapter with its card as a run of SFT has it. Returns its outputs (1, T, V)."""
    config = LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, revision=base_commit
    )
    model = get_peft_model(base, config)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    outputs = _outputs(model)
    ids = torch.tensor([_tokenizer()(_TEXT).input_ids])
    loss = torch.nn.functional.cross_entropy(outputs[0, :-1], ids[0, 1:])
    card = CardOptions(
        kind="sft", base_model=base_id, base_revision=base_commit, chat=False, base_dtype="float32", prompt_form="text"
    )
    report = RunReport(
        seed=0,
        command="hf-rlhf check-hub",
        versions=versions(),
        sft=SFTSection(metrics={"eval_loss": loss.item(), "heldout_rows": 1}),
        card=card,
    )
    report.save(folder)
    return outputs


@torch.no_grad()
def _outputs(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([_tokenizer()(_TEXT).input_ids])
    return model.eval()(ids).logits
