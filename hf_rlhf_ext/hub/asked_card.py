"""What the caller of a push wants in the card: the options of `push_to_hub` of Trainer and TRL, and of `push_run`."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError
from .card import KINDS
from .refusals import check_license
from .report import CardOptions, RunReport

CARD_OPTIONS = (
    "model_name",
    "dataset_name",
    "tags",
    "language",
    "license",
    "license_name",
    "license_link",
    "finetuned_from",
    "tasks",
    "dataset_tags",
    "dataset",
    "dataset_args",
)
"""Options that `push_to_hub` and `create_model_card` take, as those of Trainer and TRL."""
_ROLES = {"sft": "demonstrations", "policy": "prompts"}
_LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")


@dataclass(frozen=True)
class AskedCard:
    """What a caller wants in the card.

    Attributes:
        model_name: Title of the card.
        base_model: Hub id of the base.
        language: Code of the language of the texts, or several.
        license: The Hub's id of the license.
        license_name: Name of a license that is `other`.
        license_link: Address of a license that is `other`.
        tags: Tags, in addition to those of the kind of model.
        datasets: Hub ids of the training data.
        data: Names and configurations of the training data, as entries of `CardOptions.data` without a role.
    """

    model_name: str | None = None
    base_model: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    data: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of_options(cls, options: Mapping[str, Any], kind: str, token: str | None = None) -> Self:
        """Reads the options of `push_to_hub` or `create_model_card` of a trainer.

        Args:
            options: The options that the caller gave. Those that are None are as if they were not given.
            kind: Kind of model, a key of `hub.card.KINDS`.
            token: Access token, for a Hub that wants one to check a value.

        Raises:
            UserError: An option does not exist, or its value is not possible.
        """
        for name in options:
            if name not in CARD_OPTIONS:
                raise UserError(f"push_to_hub: no option {name!r}: {_nearest(name)}")
        given = {name: value for name, value in options.items() if value is not None}
        _check_tasks(as_texts("tasks", given.get("tasks")), kind)
        ids = as_texts("dataset_name", given.get("dataset_name"))
        tagged = as_texts("dataset_tags", given.get("dataset_tags"))
        return cls(
            model_name=_text("model_name", given.get("model_name")),
            base_model=_text("finetuned_from", given.get("finetuned_from")),
            language=given.get("language"),
            license=_text("license", given.get("license")),
            license_name=_text("license_name", given.get("license_name")),
            license_link=_text("license_link", given.get("license_link")),
            tags=as_texts("tags", given.get("tags")),
            datasets=_ids("dataset_name", ids) + _ids("dataset_tags", tagged),
            data=_data(ids, tagged, as_texts("dataset", given.get("dataset")), given.get("dataset_args")),
        ).checked(token)

    def checked(self, token: str | None = None) -> Self:
        """Returns itself.

        Raises:
            UserError: The Hub would refuse a value.
        """
        if self.license is not None:
            check_license(self.license, name=self.license_name, link=self.license_link, token=token)
        elif self.license_name or self.license_link:
            raise UserError("license_name and license_link belong to a license that is `other`: pass license='other'.")
        _ids("datasets", self.datasets)
        for language in as_texts("language", self.language):
            if not _LANGUAGE.fullmatch(language):
                raise UserError(f"language: {language!r} is no code of a language: use one of ISO 639, such as en.")
        return self

    def after(self, earlier: Self) -> Self:
        """Joins this with what was asked for before, which this adds to or replaces."""
        values = {}
        for spec in fields(self):
            own, before = getattr(self, spec.name), getattr(earlier, spec.name)
            if isinstance(own, tuple):
                values[spec.name] = (*before, *(item for item in own if item not in before))
            else:
                values[spec.name] = before if own is None else own
        if self.license is not None:  # the name and link of another license say nothing of this one
            values |= {"license_name": self.license_name, "license_link": self.license_link}
        return replace(self, **values)

    @property
    def names(self) -> list[str]:
        """Names of what was asked for."""
        return [spec.name for spec in fields(self) if getattr(self, spec.name)]

    @property
    def header_keys(self) -> set[str]:
        """Keys of the header whose values the owner's earlier ones must give way to."""
        keys = {name for name in ("language", "license", "base_model") if getattr(self, name)}
        return keys | {"license_name", "license_link"} if self.license else keys

    def changes(self, card: CardOptions) -> dict[str, Any]:
        """Returns the card options to change, as they are with those of the recorded card."""
        changes: dict[str, Any] = {}
        for name in ("model_name", "base_model", "language"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        if self.license is not None:
            changes |= {"license_name": self.license_name, "license_link": self.license_link}
        if self.tags:
            changes["tags"] = [*card.tags, *(tag for tag in self.tags if tag not in card.tags)]
        if self.datasets:
            # Those of the record first, since `dataset_revision` is a commit of the first.
            changes["datasets"] = [*card.datasets, *(name for name in self.datasets if name not in card.datasets)]
        if self.data:
            changes["data"] = _with_names(card.data, self.data, _ROLES.get(card.kind, "comparisons"))
        return changes

    def written_into(self, report: RunReport) -> None:
        """Changes the card options and the license of a report that has a card."""
        if report.card is None:
            return
        report.card = replace(report.card, **self.changes(report.card))
        if self.license is not None:
            report.license = self.license


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, CARD_OPTIONS, n=1)
    return f"did you mean {near[0]}?" if near else f"use {', '.join(CARD_OPTIONS)}."


def _text(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise UserError(f"{name}: got {value!r}: pass a text.")


def as_texts(name: str, value: Any) -> tuple[str, ...]:
    """Returns a text, or a list of texts, as a tuple without repetitions. None is an empty one.

    Raises:
        UserError: The value is something else.
    """
    values = [value] if isinstance(value, str) else value or ()
    values = list(values) if isinstance(values, Iterable) else [None]
    if not all(isinstance(text, str) and text.strip() for text in values):
        raise UserError(f"{name}: got {value!r}: pass a text or a list of texts.")
    return tuple(dict.fromkeys(sorted(values) if isinstance(value, set) else values))


def _ids(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """Ids of datasets on the Hub."""
    for value in values:
        try:
            validate_repo_id(value)
        except HFValidationError:
            raise UserError(
                f"{name}: {value!r} is no id of a dataset on the Hub: write owner/name, and the name of other data as "
                "dataset= of push_to_hub."
            ) from None
    return tuple(values)


def _check_tasks(tasks: Sequence[str], kind: str) -> None:
    task = KINDS[kind].pipeline_tag
    for name in tasks:
        if name != task:
            raise UserError(f"tasks: {name!r} is not what this trainer trains, which is {task}: leave tasks out.")


def _data(
    ids: tuple[str, ...], tags: tuple[str, ...], names: tuple[str, ...], configs: str | Sequence[str] | None
) -> tuple[dict[str, Any], ...]:
    """The datasets by id or name. `dataset` are the titles of `dataset_tags`, and `dataset_args` the configurations."""
    arguments = [configs] if isinstance(configs, str) else list(configs or ())
    if tags and names and len(tags) != len(names):
        raise UserError(f"dataset: {len(names)} names for {len(tags)} dataset_tags: give a name for each of them.")
    keys = [*(tags or names), *ids]
    if len(arguments) > len(keys):
        raise UserError(
            f"dataset_args: {len(arguments)} for {len(keys)} datasets: name them in dataset_tags or dataset."
        )
    entries = []
    for index, key in enumerate(keys):
        entry: dict[str, Any] = {"name": key}
        if tags and index < len(names) and names[index] != key:
            entry["title"] = names[index]
        if index < len(arguments) and arguments[index]:
            entry["config"] = str(arguments[index])
        entries.append(entry)
    return tuple(entries)


def _with_names(
    recorded: Sequence[Mapping[str, Any]], named: Sequence[Mapping[str, Any]], role: str
) -> list[dict[str, Any]]:
    """The recorded data with the names that the caller gave.

    A single dataset of training gets the name of a single one that the caller named, unless it came from the Hub under
    another name.
    """
    data = [dict(entry) for entry in recorded]
    training = [entry for entry in data if entry.get("role") == role]
    for entry in named:
        same = [known for known in training if known.get("name") == entry["name"]]
        if not same and len(named) == len(training) == 1 and "revision" not in training[0]:
            same = training
        if same:
            same[0].update(entry)
        else:
            data.append({"role": role, **entry})
    return data
