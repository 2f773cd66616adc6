"""What the Hub stand-in refuses in the header of a card, in the real Hub's words where they are known."""

import re

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_rlhf_ext.hub.licenses import HUB_LICENSES


def header_of(content: str):
    """Returns the header of a README.md. None if there is none."""
    front = re.match(r"---\r?\n(.*?)\r?\n---(\r?\n|$)", content, re.DOTALL)
    return yaml.safe_load(front[1]) if front else None


def understood(content: str) -> dict:
    """Returns what the Hub says of a repository from the header of its README.md."""
    header = header_of(content) or {}
    bases, relation = header.get("base_model") or [], header.get("base_model_relation")
    if relation is None and header.get("library_name") == "peft":
        relation = "adapter"
    tags = list(header.get("tags", []))
    for base in [bases] if isinstance(bases, str) else bases:
        tags += [f"base_model:{base}", f"base_model:{relation or 'finetune'}:{base}"]
    known = {key: header[key] for key in ("pipeline_tag", "library_name") if key in header}
    return {"tags": tags, "cardData": header} | known


def errors_in(content: str) -> tuple[list[str], list[str]]:
    """Returns the errors and the warnings of the Hub for a README.md."""
    try:
        header = header_of(content)
    except yaml.YAMLError as error:
        return [str(error)], []
    if not header:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(header, dict):
        return ['"metadata" must be of type object'], []
    checks = (_license, _base_model, _datasets, _language, _tags, _model_index)
    return [error for check in checks for error in check(header)], []


def _license(header):
    stated = header.get("license")
    for license in stated if isinstance(stated, list) else [stated]:
        if license is not None and license not in HUB_LICENSES:
            yield f'"license" must be one of [{", ".join(HUB_LICENSES)}, array]'
    for key in ("license_name", "license_link"):
        if not isinstance(header.get(key, ""), str):
            yield f'"{key}" must be a string'


def _base_model(header):
    stated = header.get("base_model")
    for name in stated if isinstance(stated, list) else [stated]:
        if name is not None and not is_id(name):
            yield f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.'


def _datasets(header):
    stated = header.get("datasets") or []
    for number, name in enumerate([stated] if isinstance(stated, str) else stated):
        if not is_id(name):
            yield (
                f'"datasets[{number}]" with value "{name}" is not valid. If possible, use a dataset id from '
                "https://hf.co/datasets."
            )


def _language(header):
    stated = header.get("language") or []
    for number, code in enumerate([stated] if isinstance(stated, str) else stated):
        if code != str(code).lower():
            yield f'"language[{number}]" must only contain lowercase characters'
        elif not re.fullmatch(r"[a-z]{2,3}", str(code)) and code not in ("code", "multilingual"):
            yield (
                f'"language[{number}]" with value "{code}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code '
                "(two/three letters), or a special value like code, multilingual."
            )


def _tags(header):
    tags = header.get("tags", [])
    if not isinstance(tags, list):
        yield '"tags" must be an array'
    elif not all(isinstance(tag, str) for tag in tags):
        yield '"tags" must be an array of strings'


def _model_index(header):
    entries = header.get("model-index", [])
    if not isinstance(entries, list):
        yield '"model-index" must be an array'
        return
    for number, entry in enumerate(entries):
        where = f"model-index[{number}]"
        if not entry.get("name"):
            yield f'"{where}.name" is required'
        if not isinstance(entry.get("results"), list):
            yield f'"{where}.results" is required'
            continue
        for k, result in enumerate(entry["results"]):
            yield from _result(f"{where}.results[{k}]", result)


def _result(where, result):
    yield from _required(f"{where}.task", result.get("task"), ("type",))
    yield from _required(f"{where}.dataset", result.get("dataset"), ("type", "name"))
    for key in ("config", "split", "revision"):
        if not isinstance((result.get("dataset") or {}).get(key, ""), str):
            yield f'"{where}.dataset.{key}" must be a string'
    metrics = result.get("metrics")
    if not isinstance(metrics, list):
        yield f'"{where}.metrics" must be an array'
        return
    for number, metric in enumerate(metrics):
        yield from _required(f"{where}.metrics[{number}]", metric, ("type", "value"))
        if not isinstance(metric.get("config", ""), str):
            yield f'"{where}.metrics[{number}].config" must be a string'


def _required(where, value, keys):
    if not isinstance(value, dict):
        yield f'"{where}" is required'
        return
    for key in keys:
        if value.get(key) is None:
            yield f'"{where}.{key}" is required'


def is_id(name) -> bool:
    """True if a repository can have this name: the Hub has the same rule as its client."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
